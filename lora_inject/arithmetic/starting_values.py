"""Starting values of A and B, each layer's drawn from a seed of its own.

The seed of a layer follows from the call's seed, the adapter's name and the layer's path alone, and
values are drawn on the CPU in float32. So they depend neither on which other layers are targeted
nor on device, dtype or rank, and a model built on the meta device can get the same ones later.
"""

import hashlib
import math

import torch
from torch import Tensor


def draw_seed() -> int:
    """One draw from torch's global generator, so that ``torch.manual_seed`` decides."""
    return int(torch.randint(2**63 - 1, (1,), device="cpu").item())


def site_generator(
    seed: int, adapter: str, path: str, used: torch.Generator | None = None
) -> torch.Generator:
    """A CPU generator for one adapter on one layer; to seed one that was used is faster."""
    digest = hashlib.blake2b(f"{seed}/{adapter}/{path}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu") if used is None else used
    return generator.manual_seed(int.from_bytes(digest, "little"))


def kaiming_uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Uniform in +-1/sqrt(fan_in): kaiming with a = sqrt(5), as loralib and nn.Linear start."""
    bound = 1 / math.sqrt(fan_in)
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    return values.uniform_(-bound, bound, generator=generator)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal values."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(generator=generator)


def zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros: of A and B one starts so, and the adapter then adds nothing until it is trained."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
