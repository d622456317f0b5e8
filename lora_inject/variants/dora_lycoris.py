"""DoRA of a LoHa and of a LoKr, by rows and by columns: files of LyCORIS with a ``dora_scale``.

    V diag(m / n) or diag(m / n) V        V = W + s D, with D the change that a LoHa or a LoKr is

They act in the weight, as LoHa and LoKr do, so that V is made anyway and its lengths are its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_inject.variants.change import Change, LayerKind
from lora_inject.variants.dora import DoRA
from lora_inject.variants.dora_columns import ColumnDoRA
from lora_inject.variants.loha import LoHa
from lora_inject.variants.lokr import LoKr


@dataclass(frozen=True)
class _RowDoRA(DoRA):
    """DoRA of a change that is no product of low rank."""

    finishes = False
    peft = {}  # noqa: RUF012 (a constant of the class)
    keys = {}  # noqa: RUF012

    @torch.no_grad()
    def lengths(self, kind: LayerKind, layer: nn.Module, W: Tensor | None, c: Change) -> Tensor:
        """The lengths of the rows of V: (out,), or (E, out)."""
        lengths: Tensor = torch.linalg.vector_norm(self.whole(kind, layer, W, c), dim=-1)
        return lengths if c.spec.experts else lengths.flatten()


@dataclass(frozen=True)
class DoRALoHa(_RowDoRA, LoHa):
    """LoHa with the length of each row."""

    name = "dora_loha"
    more = (*LoHa.more, "magnitude")


@dataclass(frozen=True)
class DoRALoKr(_RowDoRA, LoKr):
    """LoKr with the length of each row."""

    name = "dora_lokr"
    more = (*LoKr.more, "magnitude")


@dataclass(frozen=True)
class ColumnDoRALoHa(ColumnDoRA, LoHa):
    """LoHa with the length of each column."""

    name = "dora_columns_loha"
    more = (*LoHa.more, "magnitude")


@dataclass(frozen=True)
class ColumnDoRALoKr(ColumnDoRA, LoKr):
    """LoKr with the length of each column."""

    name = "dora_columns_lokr"
    more = (*LoKr.more, "magnitude")
