"""Trainable rows: of a table some rows train and no others, such as those of new tokens.

The weight E (V, O) of an embedding or of an output head becomes ``E + scatter(ids, D)``, where D
holds what is added to each of the rows, and starts at zero. Neither the sum nor a gradient of the
table's size is made beside a forward: an embedding adds D to what it looked up, a head adds
``x D^T`` to its outputs of these ids. Tied, both add the same D.

Shapes: V rows of the table, O its width, n trained rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lora_inject.variants.change import Change, LayerKind, Spec
from lora_inject.variants.lora import Variant


@dataclass(frozen=True)
class Rows(Variant):
    """``scatter(ids, D)``; D is (n, O).

    Attributes:
        ids: the rows that train, in ascending order.
    """

    ids: tuple[int, ...] = ()
    name = "set of rows"
    more = ("rows",)
    additive = False

    @property
    def roles(self) -> tuple[str, ...]:
        """There is no A and no B."""
        return self.more

    @property
    def argument(self) -> str:
        """It is asked for by ids."""
        return "rows="

    @property
    def text(self) -> str:
        """What differs from plain LoRA, for tables."""
        return ", rows"

    @property
    def meaning(self) -> str:
        """With the ids."""
        return f", rows {', '.join(map(str, self.ids))}"

    @cached_property
    def index(self) -> Tensor:
        """The ids as a tensor on the CPU."""
        with torch.inference_mode(False):
            return torch.tensor(self.ids, dtype=torch.int64, device="cpu")

    def index_on(self, device: torch.device) -> Tensor:
        """The ids as a tensor on a device; to send it there does not wait for the device."""
        return self.index.to(device, non_blocking=True)

    def spec(self, kind: LayerKind, spec: Spec) -> Spec:
        """That of an embedding: the rows are what goes in, whichever way round the layer reads."""
        if kind.transposes:
            return spec
        return replace(
            spec,
            n_in=spec.n_out,
            n_out=spec.n_in,
            A_shape=spec.B_shape[::-1],
            B_shape=spec.A_shape[::-1],
        )

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The rows are (n, O)."""
        return {"rows": spec.B_shape[::-1]}

    def turned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same: rows are those of the table, whichever way round a tied layer reads it."""
        return {**tensors}

    def refusal(
        self, kind: LayerKind, layer: nn.Module, spec: Spec, beside: bool, dropout: float
    ) -> str | None:
        """What is no table, and ids that are none of its rows."""
        if not kind.has_rows or spec.experts or spec.part:
            return "rows= is for embeddings and output heads (nn.Embedding, nn.Linear), whole ones."
        W = layer._parameters.get(spec.weight)
        if type(W) is not nn.Parameter or not W.is_floating_point() or W.dtype.itemsize < 2:
            return "rows= needs the values of its weight, which is packed. Leave it out of rows=."
        beyond = [str(row) for row in self.ids if row >= spec.n_in]
        if not beyond:
            return None
        return (
            f"it has {spec.n_in} rows, from 0 on, and rows= asks for {', '.join(beyond[:3])}"
            f"{', ...' if beyond[3:] else ''}. Resize it first (model.resize_token_embeddings), or "
            "leave them out."
        )

    def starting(
        self, kind: LayerKind, layer: nn.Module, W: Tensor | None, spec: Spec,
        tensors: Mapping[str, Tensor], scaling: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Nothing is added at first."""
        return {"rows": torch.zeros(self.shapes(spec)["rows"], device="cpu")}

    def low_rank(
        self, kind: LayerKind, layer: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """As a product it would be as wide as the table."""
        return None

    def update(self, kind: LayerKind, layer: nn.Module, W: Tensor, c: Change) -> Tensor:
        """A table of zeros but for the rows."""
        return self._added(torch.zeros_like(W), c.tensors["rows"])

    def add_to_output(
        self, kind: LayerKind, layer: nn.Module, x: Tensor, former: Tensor, y: Tensor, c: Change
    ) -> Tensor:
        """What the rows make of x is added, where it meets them."""
        D = _scaled(c)
        return kind.add_rows(layer, x, y, self.index_on(D.device), D)

    def add_to_weight(
        self, kind: LayerKind, layer: nn.Module, W: Tensor, total: Tensor, c: Change
    ) -> Tensor:
        """The rows are added to those of the table."""
        return self._added(total, _scaled(c))

    def _added(self, table_VO: Tensor, D_nO: Tensor) -> Tensor:
        dtype = torch.promote_types(table_VO.dtype, D_nO.dtype)
        index_n = self.index_on(D_nO.device)
        return table_VO.to(dtype).index_add(0, index_n, D_nO.to(dtype))


def _scaled(c: Change) -> Tensor:
    """The rows times the weight with which the adapter is in use."""
    D_nO = c.tensors["rows"]
    return D_nO if not isinstance(c.factor, Tensor) and c.factor == 1 else D_nO * c.factor
