"""Matrices that are plain parameters of a module, fused experts above all.

They are targets by their own path (``"experts.gate_up_proj"``). A fused weight has three
dimensions, (E, out, in) or (E, in, out): transformers' experts say which, for others the user must.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.kinds.base import Changes, Form, Kind, Way
from lora_inject.kinds.experts import ExpertWeights
from lora_inject.kinds.multiplied import multiplied, require_no_dropout
from lora_inject.kinds.products import is_multiplied, is_multiplied_when_compiled
from lora_inject.settings import Settings
from lora_inject.variants import Spec, Variant


class ParameterKind(Kind):
    """One parameter of two or three dimensions, of whatever module; never found by module.

    Args:
        weight: the parameter's name in its module.
        layout: "out_in" or "in_out", the order of its last two dimensions.
    """

    name = "parameter"
    has_rows = True
    drops_in_products = True

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

    def effective(self, layer: nn.Module, W: Tensor, changes: Changes) -> Any:
        """The sum; of a fused weight, expert by expert as they are asked for."""
        require_no_dropout(layer, changes)
        if W.dim() < 3 or torch.compiler.is_compiling():
            return super().effective(layer, W, changes)
        return ExpertWeights(self, layer, W, changes)

    def multiplies(self, module: nn.Module, specs: Sequence[Spec], variant: Variant) -> bool:
        """By a fused weight, as its code or transformers tells."""
        fused = all(spec.experts for spec in specs)
        return fused and variant.additive and is_multiplied(module, self.weight_name)

    def compiles_products(self, module: nn.Module, dtype: torch.dtype) -> bool:
        """Where transformers runs its experts."""
        return is_multiplied_when_compiled(module, dtype)

    def multiplied(self, layer: nn.Module, W: Tensor, changes: Changes) -> Any:
        """What computes products with W and with A and B, where that is known to be enough."""
        return multiplied(self, layer, W, changes)


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
