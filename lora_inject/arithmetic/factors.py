"""An input that is an elementwise product of two tensors which autograd keeps: kept as those two.

The last layer of a gated MLP reads ``act(g) * u``, and the multiplication keeps both factors for
its own gradients. A Function that keeps their product besides can multiply again instead.
"""

from functools import partial

import torch
from torch import Tensor

from lora_inject.compat.torch_private import factors_kept, keep_instead


def keep_factors(result: Tensor, x: Tensor) -> None:
    """Let the Function that made a result keep what x was made of, where it keeps x as its first.

    The factors are what they were, or there is an error; so the values are those of x itself. It
    stays the same tensor to autograd, and second derivatives pass through it. Writing into
    ``x.data`` between the multiplication and the layer would be missed, as autograd misses it.
    """
    factors = factors_kept(x)
    if factors is not None:
        versions = [factor._version for factor in factors]
        keep_instead(result.grad_fn, partial(_multiplied, factors, versions, x.shape))


def _multiplied(factors: tuple[Tensor, Tensor], versions: list[int], shape: torch.Size) -> Tensor:
    if [factor._version for factor in factors] != versions:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            "operation: a factor of the product that an adapted layer read."
        )
    return torch.mul(*factors).view(shape)
