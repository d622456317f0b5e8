"""A start of the user's own: a function that writes into A and B."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import ArgumentError
from lora_inject.starts.default import Start
from lora_inject.variants import LayerKind, Spec

Function = Callable[[Tensor | None, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Custom(Start):
    """What ``function(W, A, B)`` makes of the usual values of A and B, in place.

    It gets the weight, or None where that is packed or sharded, and A and B in float32 on the CPU.
    Random numbers that it draws come from the layer's own seed. ``inject(init=function)`` is the
    same. A function that can be imported lets the adapted model be pickled.

    Example:
        >>> def orthogonal(W, A, B):
        ...     torch.nn.init.orthogonal_(A)
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2, init=orthogonal)
        >>> bool((model[0].lora_A @ model[0].lora_A.T - torch.eye(2)).abs().max() < 1e-6)
        True

    Attributes:
        function: what writes into A and B. One of them has to stay zero, or else the start has to
            be ``Subtracted``.
    """

    function: Function | None = None
    name = "custom"
    needs = "function"

    def zero(self, kind: LayerKind) -> str | None:
        """Only the function knows."""
        return None

    def refusal(self, kind: LayerKind, layer: nn.Module, spec: Spec) -> str | None:
        """There has to be a function."""
        if not callable(self.function):
            return f'init="{self.name}" needs a function: init=function, which writes into A and B.'
        return None

    def values(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec, scaling: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The usual start, with what the function has written."""
        assert self.function is not None
        A, B = kind.initial(spec, generator)
        W = layer._parameters.get(spec.weight)
        readable = type(W) is nn.Parameter and W.is_floating_point()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator.initial_seed())  # of the CPU alone
            self.function(W.detach() if readable and W is not None else None, A, B)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ArgumentError("init: the function made values that are not finite.")
        if A.any() and B.any() and not self.offset:
            raise ArgumentError(
                "init: the function made an A and a B that are both not zero, which would move "
                "the model's outputs.",
                remedy="Leave B at zero, or give init=lora_inject.starts.Subtracted(function), "
                "which keeps the start beside A and B and subtracts it.",
            )
        return A, B


@dataclass(frozen=True)
class Subtracted(Custom):
    """A start of the user's own whose ``B A`` is not zero: it is kept as A0 and B0."""

    name = "subtracted"
    offset = True
