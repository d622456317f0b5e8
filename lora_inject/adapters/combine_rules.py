"""Method the matrices of several adapters become one pair: the rules behind ``combine``."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_inject.arithmetic import starting_values as initial
from lora_inject.arithmetic.low_rank import truncated
from lora_inject.errors import ArgumentError
from lora_inject.settings import check_count, check_seed

Method = Literal["cat", "svd", "linear", "ties", "dare"]


Matrices = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rule:
    """Method the matrices of several adapters become one pair."""

    how: Method
    r: int | None
    density: float
    seed: int
    name: str

    def __call__(
        self, path: str, As: list[Tensor], Bs: list[Tensor], factors: list[float], exact: Matrices
    ) -> Matrices:
        """The pair for matrices that count with these factors; ``exact`` is their weighted sum."""
        if self.how == "cat":
            return exact
        if self.how == "svd":
            r = max(A.shape[-2] for A in As) if self.r is None else self.r
            return truncated(*exact, r)
        if len({A.shape for A in As}) > 1:
            raise ArgumentError(
                f"how={self.how!r} needs equal ranks, not {[A.shape[-2] for A in As]}.",
                path=path,
                remedy='Use how="cat" or how="svd".',
            )
        roots = [math.sqrt(abs(factor)) for factor in factors]
        signed = [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
        generator = initial.site_generator(self.seed, self.name, path)
        return self._sum(As, signed, generator), self._sum(Bs, roots, generator)

    def _sum(
        self, tensors: list[Tensor], factors: list[float], generator: torch.Generator
    ) -> Tensor:
        """The weighted sum of what the rule keeps."""
        kept = torch.stack([self._keep(tensor, generator) for tensor in tensors])
        scaled = kept * kept.new_tensor(factors).reshape(-1, *[1] * tensors[0].dim())
        if self.how != "ties":
            return scaled.sum(0)
        majority = torch.where(kept.sum(0) >= 0, 1, -1)
        agrees = kept.sign() == majority
        total: Tensor = (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        return total

    def _keep(self, tensor: Tensor, generator: torch.Generator) -> Tensor:
        if self.how == "ties":
            count = int(self.density * tensor.numel())
            largest = tensor.abs().flatten().topk(count).indices
            return torch.zeros_like(tensor.flatten()).index_copy(
                0, largest, tensor.flatten()[largest]
            ).reshape(tensor.shape)  # fmt: skip
        if self.how == "dare":
            draws = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor.device)
            return tensor * (draws < self.density) / self.density
        return tensor


def check_options(
    how: Method, r: int | None, density: float | None, seed: int | None
) -> tuple[int | None, float, int]:
    """The options, each given only where it has a meaning."""
    for name, value, hows in (
        ("r", r, ("svd",)), ("density", density, ("ties", "dare")), ("seed", seed, ("dare",)),
    ):  # fmt: skip
        if value is not None and how not in hows:
            raise ArgumentError(f"{name} has no meaning for how={how!r}; leave it out.")
    if how in ("ties", "dare") and (not isinstance(density, int | float) or not 0 < density <= 1):
        raise ArgumentError(f"density must be above 0 and at most 1 for how={how!r}: {density!r}.")
    seed = check_seed(seed)
    draws = how == "dare" and seed is None
    return (
        None if r is None else check_count(r, "r"),
        1.0 if density is None else float(density),
        initial.draw_seed() if draws else seed or 0,
    )
