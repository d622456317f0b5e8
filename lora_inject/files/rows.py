"""Trainable rows between a model and a file: files hold the rows, and the model what is added."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.look import Look
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import RowsData
from lora_inject.files.stored_pair import StoredPair
from lora_inject.kinds import find_kind
from lora_inject.sharding import whole
from lora_inject.variants import Rows


class LaidOutRows(NamedTuple):
    """Rows of a file with the module that they are for.

    Attributes:
        data: the rows, with the module's path in the bare model.
        module: the module.
        real: the module's path in the model as it is, wrappers included.
        delta: what is added to the base's rows.
    """

    data: RowsData
    module: nn.Module
    real: str
    delta: Tensor


def laid_out(data: RowsData, module: nn.Module, real: str) -> LaidOutRows:
    """Rows for a module.

    Raises:
        FormatError: they are no rows of its weight.
    """
    W, ids = module._parameters.get("weight"), data.ids
    if W is None or W.dim() != 2 or data.rows.shape[1] != W.shape[1] or ids[-1] >= W.shape[0]:
        shape = "no table" if W is None else tuple(W.shape)
        raise FormatError(
            f"the file has rows of {data.rows.shape[1]} features up to the id {ids[-1]}, and the "
            f"weight is {shape}.",
            path=data.path,
            remedy="Load the right base, resized as it was.",
        )
    if W.is_meta:
        raise FormatError(
            "it is on the meta device, where nothing can be loaded.",
            path=data.path,
            remedy='Call model.to_empty(device="cpu") and load the base weights first.',
        )
    own = _rows_of(W, ids)
    return LaidOutRows(data, module, real, data.rows.to(own) - own)


def _rows_of(W: Tensor, ids: Sequence[int]) -> Tensor:
    """Rows of a table, in at least float32."""
    rows = whole(W.detach())[torch.tensor(ids, device=W.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def reads_ids(module: nn.Module) -> bool:
    """Whether what comes into a layer are the ids, as into an embedding and not into a head."""
    kind = find_kind(module)
    return kind is not None and kind.transposes


def without_tied_rows(rows: Sequence[LaidOutRows]) -> list[LaidOutRows]:
    """One of those that a tied weight has in a file, an embedding's where there is one.

    Raises:
        FormatError: they differ.
    """
    kept: dict[int, LaidOutRows] = {}
    for own in sorted(rows, key=lambda own: not reads_ids(own.module)):
        first = kept.setdefault(id(own.module._parameters["weight"]), own)
        if first.data.ids != own.data.ids or not torch.equal(first.delta, own.delta):
            raise FormatError(
                f"{own.data.path} and {first.data.path} are tied in this model and have different "
                "rows in the file.",
                remedy="Untie them before loading.",
            )
    return [*kept.values()]


def rows_data(held: StoredPair) -> RowsData:
    """The rows of a layer, with what is added to them."""
    variant = held.variant
    assert isinstance(variant, Rows)
    W = held.adapter.kind.weight(held.layer, held.spec.weight)
    own, D = _rows_of(W, variant.ids), whole(held.tensors["rows"].detach())
    return RowsData(held.path, variant.ids, own + D.to(own.dtype))


def refused_rows(look: Look, pairs: Sequence[StoredPair]) -> dict[str, str]:
    """The embeddings of which PEFT would train the rows of a tied head too, and we do not."""
    adapted = {held.layer for held in pairs}
    refused: dict[str, str] = {}
    for held in pairs:
        if isinstance(held.variant, Rows) and reads_ids(held.layer):
            W = held.layer._parameters[held.spec.weight]
            others = [m for m, _ in look.tensor_places[id(W)] if m not in adapted]
            if others:
                path = look.index.path(others[0])
                refused[held.path] = f"is tied to {path}, of which PEFT would train the rows too"
    return refused


def values_for(pairs: Sequence[StoredPair], rows: Sequence[LaidOutRows]) -> Mapping[str, Any]:
    """What the rows of a file add, by loralib's keys of an adapter that is in the model.

    Raises:
        FormatError: its ids are others.
    """
    own = {
        id(held.layer._parameters[held.spec.weight]): held
        for held in reversed(pairs)
        if isinstance(held.variant, Rows) and not held.adapter.follows
    }
    values: dict[str, Tensor] = {}
    for given in rows:
        found = own.get(id(given.module._parameters["weight"]))
        ids = found.variant.ids if found and isinstance(found.variant, Rows) else ()
        if found is None or ids != given.data.ids:
            raise FormatError(
                f"the file has {len(given.data.ids)} rows, from the id {given.data.ids[0]} on, and "
                f"the adapter has {'none' if found is None else f'others, from {ids[0]} on'}.",
                path=given.data.path,
                remedy="Load it under another name: adapter=...",
            )
        values[found.keys["rows"]] = given.delta
    return values
