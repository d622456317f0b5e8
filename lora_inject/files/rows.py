"""Trainable rows between a model and a file: files hold the rows, and the model what is added."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.look import Look
from lora_inject.core.paths import bare_key
from lora_inject.core.patterns import Pattern
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import RowsData
from lora_inject.files.stored_pair import StoredPair
from lora_inject.kinds import find_kind
from lora_inject.sharding import whole
from lora_inject.variants import Rows

# Its layer for trainable tokens multiplies by the weight alone (seen in 0.21).
_BIAS = "has a bias, which PEFT leaves out where rows of a head train"


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

    @property
    def pattern(self) -> Pattern:
        """What selects the module."""
        return Pattern(self.real, lambda path, _: path == self.real, by_name=True)


def tables_over(
    tables: Sequence[RowsData],
    modules: Mapping[str, nn.Module],
    real: Mapping[nn.Module, str],
    unknown: list[str],
) -> list[LaidOutRows]:
    """The tables of a file over a model, one of those that are tied.

    Args:
        tables: those of the file.
        modules: those of the model by path.
        real: their paths in the model as it is.
        unknown: gets the paths of those that are not there.

    Raises:
        FormatError: the rows do not fit.
    """
    found = []
    for own in tables:
        path = bare_key(own.path, modules)
        if path in modules:
            module = modules[path]
            found.append(laid_out(replace(own, path=path), module, real[module]))
        else:
            unknown.append(own.path)
    return without_tied_rows(found)


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
    if has_bias(module):
        raise FormatError(_BIAS, path=data.path, remedy="Load it with PEFT, and merge it there.")
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


def has_bias(module: nn.Module) -> bool:
    """Whether a layer is a head that adds a bias."""
    return not reads_ids(module) and module._parameters.get("bias") is not None


def without_tied_rows(rows: Sequence[LaidOutRows]) -> list[LaidOutRows]:
    """One of those that a tied weight has in a file, an embedding's where there is one.

    Raises:
        FormatError: they differ.
    """
    kept: dict[int, LaidOutRows] = {}
    for own in sorted(rows, key=lambda own: not reads_ids(own.module)):
        first = kept.setdefault(id(own.module._parameters["weight"]), own)
        same = first.data.ids == own.data.ids and torch.equal(first.delta, own.delta)
        if first is not own and not same:
            raise FormatError(
                f"{own.data.path} and {first.data.path} are tied in this model and have different "
                "rows in the file.",
                remedy="Untie them before loading.",
            )
    return [*kept.values()]


def stored_rows(pairs: Sequence[StoredPair]) -> tuple[RowsData, ...]:
    """The rows of an adapter's tables, with what is added to them."""
    led = {id(W) for held, _, W in _tables(pairs) if reads_ids(held.layer)}
    found = []
    for held, ids, W in _tables(pairs):
        own, D = _rows_of(W, ids), whole(held.tensors["rows"].detach())
        follows = id(W) in led and not reads_ids(held.layer)
        found.append(RowsData(held.path, ids, own + D.to(own.dtype), follows))
    return tuple(found)


def refused_rows(look: Look, pairs: Sequence[StoredPair], ties: bool) -> dict[str, str]:
    """The tables with which PEFT would compute otherwise, by path, and why.

    Args:
        look: the model.
        pairs: the pairs of the adapter.
        ties: whether PEFT knows that the model's head is tied to its embedding.
    """
    tables = _tables(pairs)
    alone, own = len(tables) == len(pairs), {held.layer for held, *_ in tables}
    refused: dict[str, str] = {}
    for held, _, W in tables:
        tied = [module for module, _ in look.tensor_places[id(W)] if module is not held.layer]
        others = [look.index.path(module) for module in tied if module not in own]
        if held.spec.weight != "weight":
            refused[held.path] = "has a parameter of its own, of which PEFT trains no rows"
        elif has_bias(held.layer):
            refused[held.path] = _BIAS
        elif others and reads_ids(held.layer):
            refused[held.path] = f"is tied to {others[0]}, of which PEFT would train the rows too"
        elif tied and alone and not ties:
            refused[held.path] = "is tied, which its model has no config to tell PEFT of"
    return refused


def _tables(pairs: Sequence[StoredPair]) -> list[tuple[StoredPair, tuple[int, ...], Tensor]]:
    """The tables of which rows train, with the ids and the weight."""
    return [
        (held, held.variant.ids, held.adapter.kind.weight(held.layer, held.spec.weight))
        for held in pairs
        if isinstance(held.variant, Rows)
    ]


def values_of_tables(rows: Sequence[LaidOutRows]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What the rows of a file add, by path and prefix of each pair and by role."""
    return {(own.real, ""): {"rows": own.delta} for own in rows}


def values_for(pairs: Sequence[StoredPair], rows: Sequence[LaidOutRows]) -> dict[str, Tensor]:
    """What the rows of a file add, by loralib's keys of an adapter that is in the model.

    Raises:
        FormatError: its ids are others.
    """
    own = {id(W): (held, ids) for held, ids, W in _tables(pairs) if not held.adapter.follows}
    values: dict[str, Tensor] = {}
    for given in rows:
        found, ids = own.get(id(given.module._parameters["weight"]), (None, ()))
        if found is None or ids != given.data.ids:
            raise FormatError(
                f"the file has {len(given.data.ids)} rows, from the id {given.data.ids[0]} on, and "
                f"the adapter has {'none' if found is None else f'others, from {ids[0]} on'}.",
                path=given.data.path,
                remedy="Load it under another name: adapter=...",
            )
        values[found.keys["rows"]] = given.delta
    return values
