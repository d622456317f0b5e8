"""How the weight of a fine-tuned model becomes the tensors of an adapter, variant by variant.

Shapes: O out features, I in features, R rank; experts before them.
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from lora_inject.arithmetic.low_rank import dominant
from lora_inject.errors import ArgumentError

OVERSAMPLING, ITERATIONS = 10, 4  # of the randomized decomposition: within 1 % of the exact one
ROUNDS = 8  # of fitting lengths and directions in turn; more gain little
Decomposing = Callable[[Tensor], tuple[Tensor, Tensor]]


def factors(difference_OI: Tensor, rank: int, path: str) -> tuple[Tensor, Tensor]:
    """A and B of which the product is near a matrix.

    Raises:
        ArgumentError: its values are too large.
    """
    q = min(rank + OVERSAMPLING, *difference_OI.shape[-2:])
    try:
        U, S, V = dominant(difference_OI, q, ITERATIONS)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        S = difference_OI.new_full((1,), float("nan"))  # which GPUs return where CPUs raise
    if not S.isfinite().all():
        raise ArgumentError("the difference of the models is too large to decompose.", path=path)
    root = S[..., :rank].sqrt().unsqueeze(-2)
    return (V[..., :rank] * root).transpose(-2, -1), U[..., :rank] * root


class Extracting:
    """Plain LoRA: ``B A`` is the difference."""

    def pair(self, W_OI: Tensor, T_OI: Tensor, decompose: Decomposing) -> tuple[Tensor, Tensor]:
        """A and B of weights W before and T after, by what makes both of a matrix."""
        return decompose(T_OI - W_OI)

    def made(self, W_OI: Tensor, T_OI: Tensor, BA_OI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The change of W, and the tensors besides A and B."""
        return BA_OI, {}


class ExtractingDoRA(Extracting):
    """``f (W + B A)``, with a factor f for each row, which the magnitude holds.

    Fitted in turn: ``B A`` with f as it is, and f with ``B A`` as it is, which never makes the
    error larger. It begins with f = 1, so that no more is lost than with LoRA, and with the f that
    would be best alone; the nearer end is taken.
    """

    def pair(self, W_OI: Tensor, T_OI: Tensor, decompose: Decomposing) -> tuple[Tensor, Tensor]:
        """A and B of weights W before and T after."""
        starts = (torch.ones_like(W_OI[..., :1]), self.ratio(W_OI, T_OI))
        fitted = [self._fitted(W_OI, T_OI, f_O1, decompose) for f_O1 in starts]

        def far(pair: tuple[Tensor, Tensor]) -> float:
            change_OI, _ = self.made(W_OI, T_OI, pair[1] @ pair[0])
            return float((T_OI - W_OI - change_OI).norm())

        return min(fitted, key=far)

    def _fitted(
        self, W_OI: Tensor, T_OI: Tensor, f_O1: Tensor, decompose: Decomposing
    ) -> tuple[Tensor, Tensor]:
        for _ in range(ROUNDS):
            A_RI, B_OR = decompose(T_OI - f_O1 * W_OI)
            nothing = f_O1.abs() < torch.finfo(f_O1.dtype).eps  # a row of zeros in T
            B_OR = torch.where(nothing, 0.0, B_OR / f_O1)
            f_O1 = self.ratio(W_OI + B_OR @ A_RI, T_OI)
        return A_RI, B_OR

    def ratio(self, V_OI: Tensor, T_OI: Tensor) -> Tensor:
        """The factors of rows that bring V nearest to T."""
        squares_O1 = V_OI.square().sum(-1, keepdim=True)
        return (V_OI * T_OI).sum(-1, keepdim=True) / squares_O1.clamp_min(
            torch.finfo(V_OI.dtype).tiny
        )

    def made(self, W_OI: Tensor, T_OI: Tensor, BA_OI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The change of W, and the magnitude."""
        V_OI = W_OI + BA_OI
        f_O1 = self.ratio(V_OI, T_OI)
        magnitude = f_O1 * V_OI.norm(dim=-1, keepdim=True)
        return f_O1 * V_OI - W_OI, {"magnitude": magnitude.squeeze(-1)}


EXTRACTING: Final[Mapping[str, Extracting]] = {"lora": Extracting(), "dora": ExtractingDoRA()}
