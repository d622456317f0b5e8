"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT, vLLM and diffusers read. The format is PEFT's (checked against 0.21); what it has no word
for (parts, several dropouts, the fingerprint of the base) stands in the metadata of the tensors'
file, which PEFT ignores.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.formats import peft_lycoris, peft_rows
from lora_inject.files.formats.card import CARD, card, is_ours
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import over_all_channels, whole_layers, with_whole_attention
from lora_inject.files.formats.peft_bias import added_biases, without_lora_bias
from lora_inject.files.formats.peft_config import (
    CONFIG,
    METADATA,
    PICKLED,
    REMADE_STARTS,
    TENSORS,
    Scalings,
    as_said,
    check_config,
    check_words,
    own_metadata,
    with_numbers,
)
from lora_inject.files.formats.peft_keys import (
    OUT_PROJ,
    OUT_PROJ_TIMES,
    PREFIX,
    Names,
    base_key,
    tensor_key,
)
from lora_inject.files.formats.peft_nested import unwrapped
from lora_inject.files.formats.peft_pairs import PairReader, sorted_out
from lora_inject.files.formats.peft_targets import require_targets
from lora_inject.files.formats.peft_variants import (
    keys_of_others,
    with_moved_base,
    with_others,
    without_others,
    words_of,
)
from lora_inject.files.formats.peft_written import to_config, to_metadata
from lora_inject.files.formats.state import IN_MEMORY, AdapterState
from lora_inject.files.formats.storage import (
    read_json,
    read_pickled,
    read_tensors,
    replaced_together,
    write_json,
    write_tensors,
    write_text,
)

SUFFIXES = ()  # it is a directory


def looks_like(path: Path) -> bool:
    """Whether it is a directory as PEFT writes it, or the file of tensors in one."""
    if path.is_file():
        return path.name == TENSORS or (path.name == PICKLED and (path.parent / CONFIG).exists())
    return path.is_dir() and (path / CONFIG).exists()


def read(path: Path, index: Index | None = None, alpha: float | None = None) -> AdapterData:
    """Read a PEFT directory.

    Args:
        path: the directory, or the file of tensors in it.
        index: the model that it is for; without one, fused parameters stay as in the file.
        alpha: for a config without ``lora_alpha``, of which PEFT would silently make 8.

    Raises:
        FormatError: a file is not there or not whole, or says what cannot be honoured.
    """
    folder, file = (path.parent, path) if path.is_file() else (path, path / TENSORS)
    if not file.exists() and (folder / PICKLED).exists():
        file = folder / PICKLED
    config = read_json(folder / CONFIG)
    tensors, metadata = read_tensors(file) if file.name != PICKLED else (read_pickled(file), {})
    return from_tensors(config, tensors, metadata, folder, index, alpha)


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    index: Index | None,
    alpha: float | None,
) -> AdapterData:
    """What PEFT's config and tensors say; ``path`` is for errors."""
    config = with_numbers(config)
    check_words(config, path / CONFIG)
    if config.get("peft_type") in peft_lycoris.TYPES:
        return peft_lycoris.from_tensors(config, tensors, metadata, path, index, alpha)
    check_config(config, path / CONFIG)
    own = own_metadata(config, metadata, path)
    modules = None if index is None else bare_modules(index.by_path)
    said = {*own.get("names", ())}
    names = Names({*said, *_names(modules or {})})
    bases = names.adapted_weights(tensors)
    tensors, like_ours = names.without(tensors, said)
    tensors, tables = peft_rows.without_rows(tensors, config, path)
    tensors, betas = without_lora_bias(tensors)
    tensors, of_variants = without_others(tensors)
    found, others = sorted_out(tensors, names, path)
    stacked = [key for key in found if key.startswith(PREFIX) or 2 * PREFIX in key]
    require_targets(config, [unwrapped(k.removesuffix(OUT_PROJ)) for k in stacked], path / CONFIG)
    scalings = Scalings(config, alpha, path / CONFIG)
    reader = PairReader(config, own, found, names, modules, scalings, path)
    for key in own.get("padding", ()):  # zeros of what was never adapted
        found.pop(key, None)
    pairs = [pair for key, halves in found.items() for pair in reader.pairs(key, *halves)]
    pairs = with_others(pairs, of_variants, config, path)
    added = added_biases(betas, pairs, config, path)
    if config.get("init_lora_weights") in REMADE_STARTS:
        pairs = with_moved_base(pairs, config, modules or {}, path)
    bias = own.get("bias") or config.get("bias") or "none"
    return AdapterData(
        pairs=tuple(pairs),
        tensors={**others, **like_ours},
        bias="lora_only" if added and bias != "all" else bias,
        train_also=tuple(own.get("train_also") or config.get("modules_to_save") or ()),
        facts={
            "format": "PEFT",
            "config": config,
            "base_weights": bases,
            **({"train_also": own["train_also"]} if "train_also" in own else {}),
        },
        tables=tables,
        added=added,
        **as_said(config, own),
    )


def _names(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The paths of modules, and the names of their tensors."""
    for path, module in modules.items():
        yield path
        for name in (*module._parameters, *module._buffers):
            yield f"{path}.{name}".lstrip(".")


def write(data: AdapterData, path: Path) -> None:
    """Write a PEFT directory with a model card; files of other names that are there stay.

    Raises:
        FormatError: the adapter holds what PEFT cannot read, or the directory cannot be written.
    """
    config, tensors, own = to_tensors(data)
    cards = [path / CARD] if is_ours(path) else []
    with replaced_together(path / CONFIG, path / TENSORS, *cards) as (first, second, *rest):
        write_json(config, first)
        write_tensors(tensors, second, {"format": "pt", METADATA: own})
        for file in rest:
            write_text(card(data, path, "peft"), file)


def to_state(data: AdapterData) -> AdapterState:
    """The same without a file.

    Raises:
        FormatError: as ``write``.
    """
    config, tensors, own = to_tensors(data)
    return AdapterState(tensors, "peft", config, {METADATA: own})


def from_state(state: AdapterState, index: Index | None, alpha: float | None) -> AdapterData:
    """What the config and the tensors say.

    Raises:
        FormatError: as ``read``.
    """
    return from_tensors(state.config, state, state.metadata, IN_MEMORY, index, alpha)


def to_tensors(data: AdapterData) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """PEFT's config, its tensors, and the metadata that is ours.

    Raises:
        FormatError: the adapter holds what PEFT cannot read.
    """
    for name, why in data.facts.get("refused", {}).items():
        raise FormatError(f"{name} {why}.", remedy='Save it as "loralib".')
    if peft_lycoris.is_one(data):
        return peft_lycoris.to_tensors(data)
    words = words_of(data)
    for pair in data.pairs:
        if pair.form == "other":
            raise FormatError(
                f"{pair.name} is of a kind that PEFT has no adapter for, or computes otherwise.",
                remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
            )
        known = pair.form == "experts" or pair.weight in ("weight", "in_proj_weight")
        if not known or not pair.path:
            raise FormatError(f"{pair.name or 'the model itself'} is nothing that PEFT can adapt.")
    whole = with_whole_attention(whole_layers(data.pairs))
    tensors = _tensors(whole) | keys_of_others(whole, PREFIX) | peft_rows.keys_of(data, PREFIX)
    if whole:
        config = {**to_config(data, whole), **words, **peft_rows.words_of(data)}
    else:
        config = peft_rows.config_alone(data)
    inside = {peft_rows.in_wrapper(name, data): tensor for name, tensor in data.tensors.items()}
    tensors |= {base_key(name, whole): tensor for name, tensor in inside.items()}
    own = {(pair.path, pair.weight) for pair in data.pairs if not pair.filled}
    padding = [name for name, pair in _named(whole) if (pair.path, pair.weight) not in own]
    return config, tensors, json.dumps({**to_metadata(data, whole, config), "padding": padding})


def _named(pairs: Iterable[PairData]) -> Iterator[tuple[str, PairData]]:
    """What PEFT calls the module of each pair."""
    experts: dict[str, list[PairData]] = {}
    for pair in pairs:
        if pair.form == "experts":
            experts.setdefault(pair.path, []).append(pair)
        elif pair.in_attention:
            yield pair.path.removesuffix(".out_proj") + OUT_PROJ, pair
        else:
            yield pair.path, pair
    for path, own in experts.items():
        for depth, pair in enumerate(reversed(own)):  # in the module's order, the last outermost
            yield path + ".base_layer" * depth, pair


def _tensors(pairs: Iterable[PairData]) -> dict[str, Tensor]:
    keys: dict[str, Tensor] = {}
    for name, pair in _named(pairs):
        A, B, form = pair.A, pair.B, pair.form
        if form == "experts":
            form = "linear"
            if A.dim() == 3:
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        else:
            A = over_all_channels(pair)
        keys[tensor_key(form, name, "A")] = A
        keys[tensor_key(form, name, "B")] = B / (OUT_PROJ_TIMES if pair.in_attention else 1)
    return keys
