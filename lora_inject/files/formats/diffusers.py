"""diffusers directories: ``pytorch_lora_weights.safetensors`` with PEFT's keys.

In place of PEFT's prefix stands the component of the pipeline (``unet.``, ``transformer.``), or
nothing, as ``save_lora_adapter`` has it; PEFT's config stands in the metadata of the file. One file
is for a whole pipeline. A module can be named as other tools do: ``formats.image_names``.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.errors import FormatError
from lora_inject.files.formats import kohya, peft
from lora_inject.files.formats.card import CARD, card, is_ours
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.formats.image_names import DOTTED, LEVEL, family_of, prefixes, text
from lora_inject.files.formats.image_parts import Choice, ModelNames
from lora_inject.files.formats.peft_config import METADATA as OWN_METADATA
from lora_inject.files.formats.peft_config import Scalings, with_numbers
from lora_inject.files.formats.peft_keys import PREFIX, pair_key
from lora_inject.files.formats.state import IN_MEMORY, AdapterState
from lora_inject.files.formats.storage import (
    parse_json,
    read_tensors,
    replaced_together,
    tensor_names,
    write_tensors,
    write_text,
)

TENSORS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
SUFFIXES = ()  # it is a directory


def looks_like(path: Path) -> bool:
    """Whether it is a directory as diffusers writes it, or a file with such keys."""
    if path.is_file() and path.suffix == ".safetensors":
        return any(pair_key(key) and not key.startswith(PREFIX) for key in tensor_names(path))
    return path.is_dir() and (path / TENSORS).exists()


def read(
    path: Path, index: Index | None = None, alpha: float | None = None, component: str = ""
) -> AdapterData:
    """Read a directory, or the file in it.

    Args:
        path: the directory or the file.
        index: the model that it is for, whose part is read; None reads the only one.
        alpha: for files without a config; None takes each layer's rank, as diffusers does.
        component: what the model is in its pipeline, where that is known.

    Raises:
        FormatError: the file is not there or not whole, or holds other components only.
    """
    tensors, metadata = read_tensors(path / TENSORS if path.is_dir() else path)
    owners = {found[0] for key in tensors if (found := pair_key(key))}
    if not owners:  # as diffusers' first files were, or kohya's in a directory
        return kohya.from_tensors(tensors, metadata, path, index, alpha, component)
    if index is None:
        front = _only_front(owners, metadata, path)
        own = {_without(key, front): t for key, t in tensors.items() if _is_under(key, front)}
        said = _said(metadata, front, path)
        return _from_tensors(*said, own, path, None, alpha)
    names = ModelNames(index, component)
    choice = names.choose(owners, _rows(tensors), path)
    if not choice.slots:
        return AdapterData((), left=choice.left)
    front = names.place(next(iter(choice.slots))).front
    config, own_metadata = _said(metadata, front, path)
    if not choice.is_plain and config:
        raise FormatError(f"{path} has a config for names that are several layers here.")
    if not choice.is_plain:
        return kohya.from_tensors(tensors, metadata, path, index, alpha, component)
    if config and not own_metadata:
        config = _by_own_names(config, tensors, choice, front, alpha, path)
    own = _own_keys(tensors, choice, names, front)
    data = _from_tensors(config, own_metadata, own, path, index, alpha)
    return replace(data, left=choice.left)


def from_state(state: AdapterState, index: Index | None, alpha: float | None) -> AdapterData:
    """The same without a file.

    Raises:
        FormatError: as ``read``.
    """
    return _from_tensors(state.config, state.metadata, dict(state), IN_MEMORY, index, alpha)


def _from_tensors(
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    own: dict[str, Tensor],
    path: Path,
    index: Index | None,
    alpha: float | None,
) -> AdapterData:
    """What the tensors of one component say, by keys without its prefix."""
    alphas = {key: own.pop(key) for key in list(own) if key.endswith(".alpha")}
    if not config:
        if wrong := [key for key, value in alphas.items() if value.numel() != 1]:
            raise FormatError(f"{path}: {wrong[0]} must be one number.")
        given = {_owner(key): float(value) for key, value in alphas.items()}
        # Of what has no such dimension, the reader of pairs tells.
        ranks = {_owner(key): (*t.shape, 0, 0)[1] for key, t in own.items() if ".lora_B" in key}
        scale = {name: given.get(name, r if alpha is None else alpha) for name, r in ranks.items()}
        config = {"peft_type": "LORA", "lora_alpha": 1, **_each(ranks, scale)}
    data = peft.from_tensors(config, own, metadata, path, index, alpha)
    return replace(data, facts={**data.facts, "format": "diffusers"})


def _each(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """What a config says of rank and alpha, layer by layer."""
    patterns = ({f"^{re.escape(name)}": value for name, value in values.items()}
                for values in (ranks, alphas))  # fmt: skip
    return {"r": 0, **dict(zip(("rank_pattern", "alpha_pattern"), patterns, strict=True))}


def _by_own_names(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    choice: Choice,
    front: str,
    alpha: float | None,
    path: Path,
) -> dict[str, Any]:
    """Another library's config, which goes by the names of the file, by those of the model."""
    own = {name: slots[0].path for name, slots in choice.slots.items()}
    if all(_without(name, front) == path for name, path in own.items()):
        return dict(config)
    scalings = Scalings(with_numbers(config), alpha, path)
    found = {(key[0], key[1]): t for k, t in tensors.items() if (key := pair_key(k))}
    ranks = {name: int(found[name, "A"].shape[0]) for name in own if (name, "A") in found}
    alphas = {own[n]: scalings.alpha_of(_without(n, front), r) for n, r in ranks.items()}
    return {**config, **_each({own[name]: r for name, r in ranks.items()}, alphas)}


def _own_keys(
    tensors: Mapping[str, Tensor], choice: Choice, names: ModelNames, front: str
) -> dict[str, Tensor]:
    """The tensors that are for the model, by its own names."""
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = pair_key(key)
        owner = found[0] if found else next((p for p in prefixes(key) if p in choice.slots), "")
        if owner in choice.slots:
            own[choice.slots[owner][0].path + key[key.index(owner) + len(owner) :]] = tensor
        elif not found and _is_under(key, front):
            own[names.tensor(_without(key, front))] = tensor
    return own


def _rows(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many outputs each layer's B is for, by its name in the file."""
    found = ((pair_key(key), tensor) for key, tensor in tensors.items() if tensor.dim())
    return {key[0]: tensor.shape[0] for key, tensor in found if key and key[1] == "B"}


def write(data: AdapterData, path: Path) -> None:
    """Write a directory, with a model card where it holds nothing else.

    What its file holds of other components of a pipeline stays in it.

    Raises:
        FormatError: the adapter holds what PEFT cannot read, or the directory cannot be written.
    """
    write_all([data], path, keep=True)


def write_all(parts: Sequence[AdapterData], path: Path, *, keep: bool = False) -> None:
    """Write the adapters of the components of a pipeline into one file.

    A card tells of one adapter: of several there is none.

    Raises:
        FormatError: as ``write``.
    """
    keys: dict[str, Tensor] = {}
    shown: dict[str, Any] = {}
    metadata, is_alone = {"format": "pt"}, len(parts) == 1
    for data in parts:
        for pair in data.pairs:
            if pair.has_own_shapes:
                pair.require_plain("diffusers' format")
        data.require_no_rows("diffusers' format")
        component = data.component or family_of(data.model_class).component
        front, state = f"{component}." if component else "", to_state(data)
        keys |= {f"{front}{_level(data)}{key}": value for key, value in state.items()}
        shown |= {f"{front}{key}": value for key, value in state.config.items()}
        metadata[_own_metadata_of(component)] = state.metadata[OWN_METADATA]
        if keep and component:
            others = _others(path / TENSORS, front)
            is_alone &= not others[0]
            keys, metadata = {**others[0], **keys}, {**others[1], **metadata}
            shown = {**others[2], **shown}
    metadata[METADATA] = json.dumps(shown, sort_keys=True)
    cards = [path / CARD] if is_alone and is_ours(path) else []
    with replaced_together(path / TENSORS, *cards) as (file, *rest):
        write_tensors(keys, file, metadata)
        for other in rest:
            write_text(card(parts[0], path, "diffusers"), other)


def _level(data: AdapterData) -> str:
    """What tools know of the path of every module, and this version of transformers has not."""
    flat = not any(name.startswith(LEVEL) for name in data.modules or ())
    return LEVEL if family_of(data.model_class).written is text and flat else ""


def _others(file: Path, front: str) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """What a file holds of other components: tensors, what is said of them, and PEFT's configs."""
    if not file.exists():
        return {}, {}, {}
    tensors, metadata = read_tensors(file)
    config = parse_json(metadata.pop(METADATA, "{}"), f"the metadata of {file}")
    metadata.pop(_own_metadata_of(front[:-1]), None)

    def is_other(key: str) -> bool:
        return not key.startswith(front) and any(_is_under(key, other) for other in DOTTED)

    kept = {key: tensor for key, tensor in tensors.items() if is_other(key)}
    return kept, metadata if kept else {}, {k: v for k, v in config.items() if is_other(k)}


def to_state(data: AdapterData) -> AdapterState:
    """The same without a file, by the keys of the model, without its name in a pipeline.

    Raises:
        FormatError: the adapter holds what PEFT cannot read.
    """
    config, tensors, own = peft.to_tensors(data)
    keys = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    return AdapterState(keys, "diffusers", config, {OWN_METADATA: own})


def _owner(key: str) -> str:
    return key.removesuffix(".alpha").partition(".lora_")[0]


def _is_under(key: str, front: str) -> bool:
    return not front or key.startswith(f"{front}.")


def _without(key: str, front: str) -> str:
    return key.removeprefix(f"{front}.") if front else key


def _own_metadata_of(component: str) -> str:
    return f"{OWN_METADATA}.{component}" if component else OWN_METADATA


def _only_front(owners: Iterable[str], metadata: Mapping[str, str], path: Path) -> str:
    """The only component in a file.

    A model may call a module of its own as a pipeline calls a component (GPT-2 has a
    ``transformer``): in the keys of a config there are no modules.

    Raises:
        FormatError: there are several.
    """
    config = parse_json(metadata.get(METADATA, "{}"), f"the metadata of {path}")
    able = [f for f in DOTTED if not config or any(_is_under(key, f) for key in config)]
    fronts = {next((f for f in able if _is_under(name, f)), "") for name in owners}
    if len(fronts) > 1:
        raise FormatError(
            f"{path} holds several components, {sorted(fronts)}, and which is meant is open."
        )
    return fronts.pop()


def _said(metadata: Mapping[str, str], front: str, path: Path) -> tuple[Any, dict[str, str]]:
    """PEFT's config of a component, and what only we say of it."""
    config = parse_json(metadata.get(METADATA, "{}"), f"the metadata of {path}")
    own = metadata.get(_own_metadata_of(front), metadata.get(OWN_METADATA))
    mine = {_without(k, front): v for k, v in config.items() if _is_under(k, front)}
    return mine, {} if own is None else {OWN_METADATA: own}
