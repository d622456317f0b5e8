"""The first two moments of vectors, added up batch by batch, and their principal directions.

Sums of squares about the mean are kept and not squares themselves: those of vectors far from zero
would lose in float32 what they are for (Chan et al. 1983). So the order of batches changes nothing
but the last bits. Shapes: N vectors, I features, K directions; leading dimensions are groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lora_inject.arithmetic.low_rank import dominant
from lora_inject.arithmetic.product import without_autocast

_EXACT = 2048  # features, up to which all directions are computed
_DOUBLE = 1024  # features, up to which float64 costs nothing to speak of
_BLOCK = 128  # features, of which both halves of the squares are as fast as one
_POWER = 4  # iterations beyond that: squares of singular values fall fast


@dataclass(frozen=True, eq=False)
class Moments:
    """How many vectors there were, their mean, and their squares about it.

    Attributes:
        count: how many.
        mean: (..., I).
        scatter: the sum of ``(x - mean) (x - mean)^T``: (..., I, I).
    """

    count: int
    mean: Tensor
    scatter: Tensor
    _found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)  # by rank

    @classmethod
    @torch.no_grad()
    def of(cls, x_NI: Tensor) -> "Moments":
        """Those of the rows of (..., N, I), in at least float32."""
        with without_autocast(x_NI.device.type):
            x_NI = x_NI.detach().to(torch.promote_types(x_NI.dtype, torch.float32))
            count = x_NI.shape[-2]
            mean_I = x_NI.sum(-2) / max(1, count)
            return cls(count, mean_I, _squares(x_NI - mean_I.unsqueeze(-2)))

    @classmethod
    def total(cls, several: Sequence["Moments"]) -> "Moments":
        """Those of all vectors together."""
        first, *rest = several
        for other in rest:
            first = first.plus(other)
        return first

    def plus(self, other: "Moments") -> "Moments":
        """Those of the vectors of both."""
        count = self.count + other.count
        apart_I = (other.mean - self.mean).unsqueeze(-1)
        share = other.count / max(1, count)
        scatter = torch.addcmul(self.scatter, apart_I, apart_I.mT, value=self.count * share)
        scatter.add_(other.scatter)
        return Moments(count, self.mean + share * apart_I.squeeze(-1), scatter)

    def is_like(self, other: "Moments") -> bool:
        """Whether both are of the same vectors, to the last bit."""
        return (
            self.count == other.count
            and self.mean.shape == other.mean.shape
            and torch.equal(self.mean, other.mean)
            and torch.equal(self.scatter, other.scatter)
        )

    def to(self, device: torch.device | str) -> "Moments":
        """The same on a device."""
        return Moments(self.count, self.mean.to(device), self.scatter.to(device))

    @property
    def is_finite(self) -> bool:
        """Whether all is: no square is larger than those of its features alone."""
        return bool(self.scatter.diagonal(dim1=-2, dim2=-1).isfinite().all())

    @property
    def second(self) -> Tensor:
        """The mean of ``x x^T``, about zero: (..., I, I)."""
        return self.scatter / self.count + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

    @property
    def variance(self) -> float:
        """The variance of all features together."""
        return float(self.scatter.diagonal(dim1=-2, dim2=-1).sum()) / self.count

    @property
    def dimensions(self) -> float:
        """How many directions of equal variance would be as even: ``(sum v)^2 / sum v^2``."""
        squares = float(self.scatter.double().square().sum())
        return (self.variance * self.count) ** 2 / squares if squares else 0.0

    def shares(self, k: int) -> Tensor:
        """The shares of the variance that the first k directions have: (..., K), falling."""
        total = self.scatter.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        exact = self.scatter.shape[-1] <= _EXACT
        values = self._spectrum[..., :k] if exact else self._top(k)[0]
        return values / total.clamp_min(torch.finfo(total.dtype).tiny)

    def directions(self, k: int) -> Tensor:
        """The first k directions of principal component analysis, orthonormal: (..., K, I)."""
        return self._top(k)[1]

    @cached_property
    def _spectrum(self) -> Tensor:
        """The squares along every principal direction, falling."""
        values: Tensor = torch.linalg.eigvalsh(self._wide)
        return values.flip(-1).clamp_min(0)

    @property
    def _wide(self) -> Tensor:
        """The squares in float64, where that costs nothing to speak of."""
        small = self.scatter.shape[-1] <= _DOUBLE and self.scatter.device.type != "mps"
        return self.scatter.double() if small else self.scatter

    @torch.no_grad()
    def _top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest squares along a direction, and these directions."""
        if k not in self._found:
            scatter, features = self.scatter, self.scatter.shape[-1]
            if features <= _EXACT:
                values, vectors = torch.linalg.eigh(self._wide)
                values, vectors = values.flip(-1)[..., :k], vectors.flip(-1)[..., :k]
            else:
                vectors, values, _ = dominant(scatter, min(2 * k, features), _POWER)
                values, vectors = values[..., :k], vectors[..., :k]
            rows_KI = vectors.mT
            largest = rows_KI.gather(-1, rows_KI.abs().argmax(-1, keepdim=True))
            # The sign of a direction is nobody's: whatever computes it, ours is the same.
            self._found[k] = values.clamp_min(0), rows_KI * largest.sign()
        return self._found[k]


def _squares(x_NI: Tensor) -> Tensor:
    """``x^T x``, of which one half is the other turned round and is not computed."""
    features = x_NI.shape[-1]
    made = x_NI.new_empty(*x_NI.shape[:-2], features, features)
    _fill_squares(made, x_NI)
    return made


def _fill_squares(made_II: Tensor, x_NI: Tensor) -> None:
    """Write ``x^T x``: the squares of each half of the features, and one product of the halves."""
    half = x_NI.shape[-1] // 2
    if 2 * half <= _BLOCK:
        made_II.copy_(x_NI.mT @ x_NI)
        return
    left, right = x_NI[..., :half], x_NI[..., half:]
    _fill_squares(made_II[..., :half, :half], left)
    _fill_squares(made_II[..., half:, half:], right)
    below = right.mT @ left
    made_II[..., half:, :half] = below
    made_II[..., :half, half:] = below.mT
