"""What starts share that are made of what a model was seen to do: of ``calibrate``'s statistics."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.moments import Moments
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.starts.default import Start, matrix_shape
from lora_inject.variants import LayerKind, Spec


@runtime_checkable
class Record(Protocol):
    """What these starts ask of statistics: ``calibration.Statistics``, which stand above."""

    def inputs_of(self, path: str) -> Moments | None:
        """The moments of what the layer at a path reads."""

    def gradient_of(self, path: str) -> Tensor | None:
        """The mean gradient of its weight, as a matrix (..., out, in)."""


@dataclass(frozen=True)
class Measured(Start):
    """A start from statistics, to which the adapter refers from then on.

    They are as large as the model or larger, so that a pickled model leaves them out: its
    ``reset_lora_parameters`` is refused.

    Attributes:
        stats: what ``calibrate`` returned.
        path: the layer's, once it is known.
    """

    stats: Record | None = None
    path: str = ""
    needs = "stats"

    def __post_init__(self) -> None:
        if not (self.stats is None or isinstance(self.stats, Record)):
            raise ArgumentError(
                f"stats must be what calibrate returns, not a {type(self.stats).__name__}."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stats": None}

    def __deepcopy__(self, memo: Any) -> "Measured":
        return self

    def at(self, path: str) -> Start:
        """The same with the layer's path."""
        return replace(self, path=path)

    @property
    def missing(self) -> str:
        """Why there is nothing to start from."""
        if self.stats is None:
            return (
                f'init="{self.name}" starts from statistics, which it has not (a pickled model '
                f"leaves them out). Give init={type(self).__name__}(calibrate(model, ...))."
            )
        return (
            f'init="{self.name}": the statistics hold nothing of it. Call calibrate on the same '
            "model with the same targets" + (", and with gradients=True." if self.of_loss else ".")
        )

    of_loss = False  # whether it starts from gradients

    def data(self, spec: Spec) -> Any:
        """What the start is made of.

        Raises:
            LoRAInjectError: it is not there.
        """
        found: Any = None
        if self.stats is not None:
            known: Any = self.stats.gradient_of if self.of_loss else self.stats.inputs_of
            found = known(self.path)
        if found is None:
            raise LoRAInjectError(self.missing, path=self.path)
        if self.of_loss and spec.part:
            return found.narrow(-2, spec.start, spec.n_out)
        return found

    def refusal(self, kind: LayerKind, layer: nn.Module, spec: Spec) -> str | None:
        """Statistics are of a layer, and fit its shape."""
        try:
            found = self.data(spec)
        except LoRAInjectError:
            return self.missing
        there = tuple(found.shape[-2:] if self.of_loss else found.mean.shape[-1:])
        shape = torch.Size(matrix_shape(kind, layer, spec))
        asked = tuple(shape if self.of_loss else shape[-1:])
        if there != asked:
            return (
                f'init="{self.name}": the statistics are of {there} features, not {asked}. Call '
                "calibrate on the same model."
            )
        return self.unfit(found, spec, shape)

    def unfit(self, found: Any, spec: Spec, shape: torch.Size) -> str | None:
        """Why these statistics do not tell where to start, with the remedy; None where they do.

        Args:
            found: the moments, or the gradient.
            spec: the pair.
            shape: (out, in) of its matrix.
        """
        return None
