"""Adapter files on their own, without weights: from one format into another, and what is in one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_inject.arithmetic.low_rank import product_norm
from lora_inject.core.index import Index
from lora_inject.core.paths import outputs
from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files import left_out
from lora_inject.files.formats import find_format, named_format, read_adapter
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import as_portable
from lora_inject.printing import Section, Shown, Tables, count, size


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    format: str | None = None,
    model: nn.Module | None = None,
    alpha: float | None = None,
    portable: bool = False,
) -> None:
    """Write an adapter in another format, with the same values.

    Example:
        >>> convert(Path("adapter"), Path("adapter.pt"), "loralib")  # doctest: +SKIP

    Args:
        source: the file or directory to read.
        target: the file or directory to write.
        to: "peft", "loralib", "kohya" or "diffusers".
        format: the format of the source; None finds out.
        model: the model that it is for, on any device: without it, flattened names and fused
            parameters cannot be told, and an embedding in a loralib file looks like a Linear layer.
        alpha: for files that do not say it.
        portable: one rank and a scaling of 1 for all layers.

    Raises:
        ArgumentError: a format is not known, or the model is needed.
        FormatError: the source cannot be read, or the target has no word for something in it.
    """
    writer = named_format(to, "to")
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
    if model is not None:
        modules = {path: outputs(module) for path, module in model.named_modules() if path}
        data = replace(data, modules=modules, model_class=type(model).__name__)
    writer.write(as_portable(data) if portable else data, target)


@dataclass(frozen=True)
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
        d = self.data
        pairs = [tensor for pair in d.pairs for tensor in (pair.A, pair.B)]
        tensors = [*pairs, *(own.rows for own in d.tables), *d.tensors.values()]
        facts = [
            ("format", str(d.facts.get("format"))),
            ("base", d.base_name or "-"),
            ("fingerprint of the base", "yes" if d.base else "no"),
            ("targets", ", ".join(d.targets) or "-"),
            ("bias", d.bias or "-"),
            ("elements", count(d.elements)),
            ("size", size(sum(t.numel() * t.element_size() for t in tensors))),
        ]
        rows = [
            (
                p.name,
                p.form if p.variant == "lora" else f"{p.form}, {p.variant}",
                str(p.rank),
                "-" if p.alpha is None else f"{p.alpha:g}",
                _dtype(p.A),
                "-" if (norm := self.norms[p.name]) is None else f"{norm:.4g}",
            )
            for p in d.pairs
        ]
        sections = [
            Section(str(self.path), ("what", "value"), facts),
            Section("Layers", ("layer", "form", ">r", ">alpha", "dtype", ">norm of s B A"), rows),
        ]
        if d.tables:
            tables = [(r.path, count(len(r.ids)), f"{r.ids[0]}..{r.ids[-1]}", _dtype(r.rows))
                      for r in d.tables]  # fmt: skip
            sections.append(Section("Rows", ("table", ">rows", "ids", "dtype"), tables))
        if d.tensors:
            others = [(name, f"{tuple(t.shape)}", _dtype(t)) for name, t in d.tensors.items()]
            sections.append(Section("Trained in place", ("tensor", "shape", "dtype"), others))
        return Tables(sections)


def inspect(path: Path, *, format: str | None = None, model: nn.Module | None = None) -> Inspection:
    """Read an adapter file and say what is in it.

    Example:
        >>> print(inspect(Path("adapter")))  # doctest: +SKIP

    Args:
        path: the file or directory.
        format: its format; None finds out.
        model: the model that it is for, whose names are shown then.

    Returns:
        Config, ranks, dtypes, the norms of the updates, sizes.

    Raises:
        FormatError: it cannot be read.
    """
    index = None if model is None else Index(model)
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
