"""A start of the user's own: a function that writes into A and B."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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

    It gets a copy of the weight, or None where that is packed or sharded, and A and B in float32 on
    the CPU.
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
        path: the layer's, once it is known.
    """

    function: Function | None = None
    path: str = ""
    name = "custom"
    needs = "function"

    def at(self, path: str) -> Start:
        """The same with the layer's path."""
        return replace(self, path=path)

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
            made = self.function(W.detach().clone() if readable and W is not None else None, A, B)
        self._require_written(made, spec, A, B)
        return A, B

    def _require_written(self, made: Any, spec: Spec, A: Tensor, B: Tensor) -> None:
        """Refuse what the function cannot have meant, or what would move outputs.

        Raises:
            ArgumentError: it is so; the model has not changed.
        """
        returned = made if isinstance(made, tuple | list) else (made,)
        if any(isinstance(t, Tensor) and t is not A and t is not B for t in returned):
            raise ArgumentError(
                f"init: the function returned other tensors than its A and B for {self.path}.",
                remedy="Write into them: A.copy_(...).",
            )
        if (A.shape, B.shape) != (spec.A_shape, spec.B_shape):
            raise ArgumentError(
                f"init: the function made an A {tuple(A.shape)} and a B {tuple(B.shape)} for "
                f"{self.path}, not {spec.A_shape} and {spec.B_shape}.",
                remedy="Write into them: A.copy_(...).",
            )
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ArgumentError(
                f"init: the function made values that are not finite for {self.path}."
            )
        if A.any() and B.any() and not self.offset:
            raise ArgumentError(
                "init: the function made an A and a B that are both not zero, which would move "
                f"the outputs of {self.path}.",
                remedy="Leave B at zero, or give init=lora_inject.starts.Subtracted(function), "
                "which keeps the start beside A and B and subtracts it.",
            )


@dataclass(frozen=True)
class Subtracted(Custom):
    """A start of the user's own whose ``B A`` is not zero: it is kept as A0 and B0."""

    name = "subtracted"
    offset = True
