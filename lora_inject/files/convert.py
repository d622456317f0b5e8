"""Adapter files on their own, without weights: from one format into another, and what is in one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.low_rank import product_norm
from lora_inject.core.index import Index
from lora_inject.core.path_groups import grouped, natural
from lora_inject.core.paths import outputs
from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files import left_out
from lora_inject.files.checkpoint_names import as_in_model
from lora_inject.files.formats import find_format, named_format, read_adapter
from lora_inject.files.formats.checkpoint import NAME as WHOLE
from lora_inject.files.formats.data import AdapterData, PairData, RowsData
from lora_inject.files.formats.pairs import as_portable
from lora_inject.files.formats.storage import as_path
from lora_inject.files.portable import for_readers
from lora_inject.printing import Section, Shown, Tables, count, size


def convert(
    source: str | PathLike[str],
    target: str | PathLike[str],
    to: str,
    *,
    format: str | None = None,
    model: nn.Module | None = None,
    alpha: float | None = None,
    portable: bool = False,
) -> None:
    """Write an adapter in another format, with the same values.

    Example:
        >>> convert("adapter", "adapter.pt", "loralib")  # doctest: +SKIP

    Args:
        source: the file or directory to read.
        target: the file or directory to write.
        to: "peft", "loralib", "kohya", "diffusers" or "gguf" (for llama.cpp).
        format: the format of the source; None finds out.
        model: the model that it is for, on any device: without it, flattened names and fused
            parameters cannot be told, and an embedding in a loralib file looks like a Linear layer;
            the names of GGUF are made from it.
        alpha: for files that do not say it.
        portable: one rank and a scaling of 1 for all layers.

    Raises:
        ArgumentError: a format is not known, or the model is needed.
        FormatError: the source cannot be read, or the target has no word for something in it.
    """
    writer, source, target = named_format(to, "to"), as_path(source), as_path(target, "target")
    data = read_adapter(source, format, None if model is None else Index(model), alpha)
    left_out.warn_of_left_parts(data)
    if data.added:
        raise FormatError(
            f"{source}: what it adds to biases of the base (lora_bias) is told by those alone.",
            remedy="Load it into its model, and save it there.",
        )
    if data.facts.get("flattened") or not all(pair.weight for pair in data.pairs):
        raise ArgumentError(
            f"{source}: which layers or parts it is for can be told by its model alone.",
            remedy="Give it: --model CONFIG." if model is None else "Load it there, and save it.",
        )
    if to != "loralib":
        for pair in data.pairs:
            pair.known_alpha  # noqa: B018 (raises where it is not known)
    modules = {} if model is None else dict(model.named_modules())
    if model is not None:
        data = as_in_model(data, model, modules)
        sizes = {path: outputs(module) for path, module in modules.items() if path}
        data = replace(data, modules=sizes, model_class=type(model).__name__)
    data = as_portable(data) if portable else data
    if model is not None:
        data = for_readers(data, to, portable, model, modules)
    writer.write(data, target)


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """What is in an adapter file; ``print`` shows it as a table."""

    path: Path
    data: AdapterData
    norms: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON."""
        return {
            "format": self.data.facts.get("format"),
            "bias": self.data.bias,
            "base": self.data.base_name,
            "fingerprint": bool(self.data.base),
            "elements": self.data.elements,
            "pairs": [
                {
                    "name": pair.name,
                    "form": pair.form,
                    "variant": pair.variant,
                    "rank": pair.rank,
                    "alpha": pair.alpha,
                    "A": list(pair.A.shape),
                    "B": list(pair.B.shape),
                    "dtype": _dtype(pair.A),
                    "norm": self.norms[pair.name],
                }
                for pair in self.data.pairs
            ],
            "rows": {own.path: list(own.ids) for own in self.data.tables},
            "tensors": {name: list(t.shape) for name, t in self.data.tensors.items()},
            "config": self.data.facts.get("config"),
        }

    def _tables(self) -> Tables:
        sections = [_facts(self.path, self.data), _layers(self.data.pairs, self.norms)]
        if self.data.tables:
            sections.append(_rows(self.data.tables))
        if self.data.tensors:
            whole = self.data.facts.get("format") == WHOLE
            title = "Other weights, of the model" if whole else "Trained in place"
            sections.append(_others(title, self.data.tensors))
        return Tables(sections)


def _facts(path: Path, data: AdapterData) -> Section:
    pairs = [tensor for pair in data.pairs for tensor in (pair.A, pair.B)]
    tensors = [*pairs, *(own.rows for own in data.tables), *data.tensors.values()]
    unsaid = any(pair.alpha is None for pair in data.pairs)
    facts = [
        ("format", str(data.facts.get("format"))),
        ("base", data.base_name or "-"),
        ("fingerprint of the base", "yes" if data.base else "no"),
        ("targets", ", ".join(data.targets) or "-"),
        ("bias", data.bias or "-"),
        *([("alpha", "not in the file: say alpha= where it is loaded")] if unsaid else []),
        ("elements", count(data.elements)),
        ("size", size(sum(t.numel() * t.element_size() for t in tensors))),
    ]
    return Section(str(path), ("what", "value"), facts)


def _layers(pairs: Iterable[PairData], norms: Mapping[str, float | None]) -> Section:
    """One row for all layers that differ in nothing but the numbers in their paths and the norm."""
    ordered = sorted(pairs, key=lambda pair: natural(pair.name))
    rows = [
        (path, *_texts(same[0]), count(len(same)), _range([norms[pair.name] for pair in same]))
        for path, same in grouped(ordered, lambda pair: pair.name, _texts)
    ]
    columns = ("~layer", "form", ">r", ">alpha", "?dtype", ">layers", ">norm of s B A")
    return Section("Layers", columns, rows)


def _texts(pair: PairData) -> tuple[str, ...]:
    """What is said of a layer beside its path: form, r, alpha, dtype."""
    form = pair.form if pair.variant == "lora" else f"{pair.form}, {pair.variant}"
    alpha = "-" if pair.alpha is None else f"{pair.alpha:g}"
    return form, str(pair.rank), alpha, _dtype(pair.A)


def _range(norms: Sequence[float | None]) -> str:
    """The smallest and the largest of some norms; nothing where one is not known."""
    known = [norm for norm in norms if norm is not None]
    if len(known) < len(norms):
        return "-"
    return " to ".join(dict.fromkeys(f"{norm:.3g}" for norm in (min(known), max(known))))


def _rows(tables: Iterable[RowsData]) -> Section:
    rows = [
        (own.path, count(len(own.ids)), f"{own.ids[0]}..{own.ids[-1]}", _dtype(own.rows))
        for own in tables
    ]
    return Section("Rows", ("~table", ">rows", "ids", "dtype"), rows)


def _others(title: str, tensors: Mapping[str, Tensor]) -> Section:
    def text(name: str) -> tuple[str, str]:
        return f"{tuple(tensors[name].shape)}", _dtype(tensors[name])

    names = sorted(tensors, key=natural)
    rows = [(path, *text(same[0]), count(len(same))) for path, same in grouped(names, str, text)]
    return Section(title, ("~tensor", "shape", "?dtype", ">tensors"), rows)


def inspect(
    path: str | PathLike[str], *, format: str | None = None, model: nn.Module | None = None
) -> Inspection:
    """Read an adapter file and say what is in it.

    Example:
        >>> print(inspect("adapter"))  # doctest: +SKIP

    Args:
        path: the file or directory.
        format: its format; None finds out.
        model: the model that it is for, whose names are shown then.

    Returns:
        Config, ranks, dtypes, the norms of the updates, sizes.

    Raises:
        FormatError: it cannot be read.
    """
    path, index = as_path(path), None if model is None else Index(model)
    data: AdapterData = find_format(path, format).read(path, index, None)
    return Inspection(path, data, {pair.name: _norm(pair) for pair in data.pairs})


def _norm(pair: PairData) -> float | None:
    """The norm of the update; None where nothing tells how it is made, or its scaling."""
    if pair.alpha is None or pair.form == "other" or pair.has_own_shapes:
        return None
    A, B = pair.A, pair.B
    if pair.form == "conv":
        groups = A.shape[0] // B.shape[1]
        A, B = A.reshape(groups, B.shape[1], -1), B.reshape(groups, -1, B.shape[1])
    if A.shape[-2] != B.shape[-1]:
        return None
    return abs(pair.scaling) * product_norm(A, B)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
