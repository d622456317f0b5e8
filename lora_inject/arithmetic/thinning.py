"""Rank dropout and module dropout: some ranks of an adapter, or all of it, left out for one call.

Both act in training alone and leave the input and the shapes as they are: a rank that is left out
is a column of zeros in B. The ranks that stay count ``1 / (1 - p)`` times, so that the mean is that
of evaluation; a whole adapter is there or not. Shapes: R rank, O out features.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_OF_RANKS = ("B", "B0")  # whose second dimension counts the rank


class Drops(NamedTuple):
    """Probabilities of leaving out.

    Attributes:
        rank: each rank.
        module: the adapter on a layer.
    """

    rank: float = 0.0
    module: float = 0.0

    @property
    def text(self) -> str:
        """Both for tables, where there are such."""
        named = (("rank dropout", self.rank), ("module dropout", self.module))
        return "".join(f", {name} {p:g}" for name, p in named if p)

    def thinned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a pair without some ranks, a start that is subtracted without the same."""
        if not self.rank:
            return {**tensors}
        B = tensors["B"]
        keep_R = F.dropout(torch.ones(B.shape[1], device=B.device), self.rank)
        keep = keep_R.to(B.dtype).reshape(-1, *(1,) * (B.dim() - 2))
        return {role: t * keep if role in _OF_RANKS else t for role, t in tensors.items()}

    def factor(self, factor: float | Tensor, like: Tensor) -> float | Tensor:
        """The factor of the adapter, or a zero on the device of a tensor."""
        if not self.module:
            return factor
        return (torch.rand((), device=like.device) >= self.module) * factor

    def folded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a pair of which all that counts are products of A and B."""
        thin, there = self.thinned(tensors), self.factor(1.0, tensors["B"])
        if not isinstance(there, Tensor):
            return thin
        return {r: t * there.to(t.dtype) if r in _OF_RANKS else t for r, t in thin.items()}
