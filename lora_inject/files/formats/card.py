"""The model card of a directory: a ``README.md`` that says what the adapter is and how to load it.

One that people have written, or changed, is left as it is.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.printing import count, plural, size
from lora_inject.variants import SCALINGS

CARD = "README.md"
_MARK = "<!-- Written by lora_inject; without this line it is left as it is. -->"
HUB_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w.-]{1,96}")
_IN_PEFT = """from peft import PeftModel

model = PeftModel.from_pretrained(model, "{path}")"""
_IN_DIFFUSERS = 'pipe.load_lora_weights("{path}")  # a pipeline of diffusers'


def is_ours(folder: Path) -> bool:
    """Whether the card of a directory may be written: there is none, or one that we wrote."""
    file = folder / CARD
    try:
        return not file.exists() or _MARK in file.read_text("utf-8")
    except (OSError, ValueError):
        return False


def card(data: AdapterData, path: Path, library: str) -> str:
    """The text of the card.

    Args:
        data: the adapter.
        path: the directory, whose name the card has.
        library: "peft" or "diffusers", which reads the files too.
    """
    other = _IN_PEFT if library == "peft" else _IN_DIFFUSERS
    name = path.resolve().name
    return "\n".join(
        (
            "---",
            *_head(data, library),
            "---",
            _MARK,
            f"# {name}",
            "",
            f"An adapter for {_base(data)}, made with lora_inject.",
            "",
            "| what | value |",
            "|---|---|",
            *(f"| {what} | {value.replace('|', '&#124;')} |" for what, value in _facts(data)),
            "",
            "Load it into the base model:",
            "",
            "```python",
            "from lora_inject import load",
            "",
            f"load(model, {json.dumps(name)})",
            "```",
            "",
            f"or by {library}:",
            "",
            "```python",
            other.format(path=name),
            "```",
            "",
        )
    )


def _head(data: AdapterData, library: str) -> Iterator[str]:
    """The metadata that the hub reads, as YAML."""
    if HUB_NAME.fullmatch(data.base_name):
        yield f"base_model: {json.dumps(data.base_name)}"
    yield f"library_name: {library}"
    yield "tags: [lora, lora_inject]"


def _base(data: AdapterData) -> str:
    name = f"`{data.base_name}`" if data.base_name else "a model"
    return f"{name} ({data.model_class})" if data.model_class else name


def _facts(data: AdapterData) -> Iterator[tuple[str, str]]:
    """What the table says: what was adapted, how, and how much of it trained."""
    pairs, others = data.pairs, [*(own.rows for own in data.tables), *data.tensors.values()]
    layers = {(pair.path, pair.weight) for pair in pairs}
    trained = [*others, *(t for pair in pairs for t in _trained(pair))]
    yield "targets", ", ".join(f"`{target}`" for target in data.targets) or "-"
    yield "adapted", plural(len(layers), "layer")
    if pairs:
        yield "rank", _numbers(pair.own_rank for pair in pairs)
        yield "alpha", _numbers(map(_alpha, pairs))
        starts = {pair.start for pair in pairs} - {""}
        yield "method", ", ".join(sorted({pair.variant for pair in pairs} | starts))
    for table in data.tables:
        yield "rows", f"{count(len(table.ids))} of `{table.path}`"
    yield "biases that trained", data.bias or "-"
    if data.train_also:
        yield "trained in full", ", ".join(f"`{path}`" for path in data.train_also)
    n_bytes = sum(t.numel() * t.element_size() for t in trained)
    yield "trained parameters", f"{count(sum(t.numel() for t in trained))}, {size(n_bytes)}"
    yield "training took", f"{size(4 * n_bytes)} of weights, gradients and states of AdamW"


def _trained(pair: PairData) -> Iterator[Tensor]:
    """The tensors of a pair without a start and without a factor that stayed as it began."""
    roles = {"A", "B", *pair.others} - {pair.fixed}
    return (tensor for role, tensor in pair.tensors.items() if role in roles)


def _alpha(pair: PairData) -> float:
    """Alpha over the rank without a start."""
    return SCALINGS[pair.rule].alpha(pair.scaling, pair.own_rank)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))
