"""Matrices that are plain parameters of a module, fused experts above all.

They are targets by their own path (``"experts.gate_up_proj"``). A fused weight has three
dimensions, (E, out, in) or (E, in, out): transformers' experts say which, for others the user must.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.compat.torch_private import tree_map
from lora_inject.kinds.base import Form, Kind, Way
from lora_inject.kinds.shown import WRITING, shown
from lora_inject.settings import Settings
from lora_inject.variants import Change, Spec, Variant


class ParameterKind(Kind):
    """One parameter of two or three dimensions, of whatever module; never found by module.

    Args:
        weight: the parameter's name in its module.
        layout: "out_in" or "in_out", the order of its last two dimensions.
    """

    name = "parameter"
    has_rows = True

    def __init__(self, weight: str, layout: str) -> None:
        self.weight_name = weight
        self.layout = layout
        self.transposes = layout == "in_out"

    def matches(self, module: nn.Module) -> bool:
        """No module as such."""
        return False

    def way(self, module: nn.Module) -> Way:
        """There is nothing to call."""
        return "weight"

    def form(self, layer: nn.Module) -> Form:
        """As PEFT has it for what it calls target parameters."""
        return "experts"

    def refusal(self, module: nn.Module, way: Way) -> str | None:
        """A sparse gradient cannot pass a computed weight."""
        if getattr(module, "sparse", False) is True:
            return "sparse=True has no gradient through a computed weight. Exclude it."
        return None

    def specs(self, module: nn.Module, settings: Settings) -> tuple[Spec, ...]:
        """One pair, or for a fused weight one for each expert: A (E, r, in), B (E, out, r)."""
        *experts, rows, columns = self.weight(module, self.weight_name).shape
        n_in, n_out = (columns, rows) if self.layout == "out_in" else (rows, columns)
        A_shape, B_shape = (*experts, settings.r, n_in), (*experts, n_out, settings.r)
        count = experts[0] if experts else 0
        return (Spec(self.weight_name, n_in, n_out, A_shape, B_shape, experts=count),)

    def initial(self, spec: Spec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A kaiming-uniform over the features it reads, whatever the number of experts; B zero."""
        A = initial.kaiming_uniform(spec.A_shape, spec.n_in, generator)
        return A, initial.zeros(spec.B_shape)

    def effective(self, layer: nn.Module, W: Tensor, changes: list[tuple[Variant, Change]]) -> Any:
        """The sum; of a fused weight, expert by expert as they are asked for."""
        if W.dim() < 3 or torch.compiler.is_compiling():
            return super().effective(layer, W, changes)
        return ExpertWeights(self, layer, W, changes)


class ExpertWeights:
    """A fused weight with its adapters, of which only what is indexed is computed.

    ``weights[e]`` and ``weights[ids]`` compute the experts they name; anything else that wants a
    tensor gets all of them, computed once.
    """

    def __init__(
        self, kind: Kind, layer: nn.Module, W: Tensor, changes: list[tuple[Variant, Change]]
    ) -> None:
        self._kind, self._layer, self._W, self._changes = kind, layer, W, changes
        self._all: Tensor | None = None

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple):
            return self._tensor()[index]
        own = [
            (variant, change._replace(tensors={r: t[index] for r, t in change.tensors.items()}))
            for variant, change in self._changes
        ]
        result: Tensor = Kind.effective(self._kind, self._layer, self._W[index], own)
        return result

    def __len__(self) -> int:
        return len(self._W)

    def __getattr__(self, name: str) -> Any:
        known = ("shape", "dtype", "device", "ndim", "dim", "size", "is_cuda", "is_cpu", "numel")
        return getattr(self._W if name in known or name in WRITING else self._tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_as_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _tensor(self) -> Tensor:
        if self._all is None:
            value = Kind.effective(self._kind, self._layer, self._W, self._changes)
            self._all = shown(value, self._W)
        return self._all


def _operator(name: str) -> Any:
    def operator(weights: ExpertWeights, *others: Any) -> Any:
        return getattr(weights._tensor(), name)(*map(_as_tensor, others))

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul",
              "rmatmul", "neg", "abs", "lt", "le", "gt", "ge"):  # fmt: skip
    setattr(ExpertWeights, f"__{_name}__", _operator(f"__{_name}__"))


def _as_tensor(value: Any) -> Any:
    return value._tensor() if isinstance(value, ExpertWeights) else value


def layout_of(module: nn.Module, parameter: Tensor) -> str | None:
    """The order of the last two dimensions: torch's for a matrix, for experts what they say.

    transformers' experts have ``is_transposed``: true for (E, in, out). None where nothing tells.
    """
    if parameter.dim() == 2:
        return "out_in"
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return "in_out" if transposed else "out_in"
    return None
