"""What a selected target becomes: a site that can be adapted, or a refusal."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from lora_inject.kinds import Kind, Spec
from lora_inject.kinds.base import Way
from lora_inject.settings import Settings


@dataclass  # not frozen, but never changed: there are very many, and each would take longer to make
class Site:
    """One layer, or one parameter, that can be adapted.

    Attributes:
        paths: its names in the model, the first in registration order first.
        type: its type in words.
        module: the layer itself, or the owner of the parameter.
        kind: the kind of layer.
        way: "branch" or "weight".
        specs: the pairs A, B that it gets.
        settings: rank, alpha, dropout and the rest.
        dtype: the dtype of A and B.
        pattern: the target pattern that chose it.
        base_elements: elements of the weights that it adapts.
        follows: the path of the site whose A and B it shares, since the weight is tied; or "".
    """

    paths: tuple[str, ...]
    type: str
    module: nn.Module = field(repr=False)
    kind: Kind = field(repr=False)
    way: Way
    specs: tuple[Spec, ...]
    settings: Settings
    dtype: torch.dtype
    pattern: str
    base_elements: int
    follows: str = ""

    @property
    def path(self) -> str:
        """Its first name."""
        return self.paths[0]

    @property
    def multiplies(self) -> bool:
        """Whether it acts in the products that its module makes with the weight: no W + s B A."""
        multiplies = self.kind.multiplies(self.module, self.specs, self.settings.variant)
        return self.way == "weight" and multiplies

    @property
    def compiles_products(self) -> bool:
        """Whether a compiler follows those products; else it makes W + s B A."""
        weights = [self.kind.weight(self.module, spec.weight) for spec in self.specs]
        return all(self.kind.compiles_products(self.module, weight.dtype) for weight in weights)

    @property
    def has_input(self) -> bool:
        """Whether the adapter sees what the layer multiplies, on which dropout acts."""
        return self.way == "branch" or (self.kind.drops_in_products and self.multiplies)

    @property
    def parameters(self) -> int:
        """How many parameters the adapter has; none of its own where it shares them."""
        variant = self.settings.variant
        return 0 if self.follows else sum(variant.elements(spec) for spec in self.specs)

    @property
    def shape_text(self) -> str:
        """The features that A reads and B writes, for a table."""
        shown = {
            (f"{spec.experts} x " if spec.experts else "") + f"{spec.n_in} x {spec.n_out}": None
            for spec in self.specs
        }
        return ", ".join(shown)


class Refusal(NamedTuple):
    """Why a target cannot be adapted, with the remedy."""

    reason: str
