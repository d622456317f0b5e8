"""diffusers directories: ``pytorch_lora_weights.safetensors`` with PEFT's keys.

In place of PEFT's prefix stands the component of the pipeline (``unet.``, ``transformer.``), or
nothing, as ``save_lora_adapter`` has it; PEFT's config stands in the metadata of the file.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.formats import peft
from lora_inject.files.formats.card import CARD, card, is_ours
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.formats.peft_config import METADATA as OWN_METADATA
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
COMPONENTS = {"UNet": "unet", "TextModel": "text_encoder", "Transformer": "transformer"}
_ALL_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
SUFFIXES = ()  # it is a directory


def looks_like(path: Path) -> bool:
    """Whether it is a directory as diffusers writes it, or a file with such keys."""
    if path.is_file() and path.suffix == ".safetensors":
        return any(pair_key(key) and not key.startswith(PREFIX) for key in tensor_names(path))
    return path.is_dir() and (path / TENSORS).exists()


def read(path: Path, index: Index | None = None, alpha: float | None = None) -> AdapterData:
    """Read a directory, or the file in it.

    Args:
        path: the directory or the file.
        index: the model that it is for, whose component is read; None reads the only one.
        alpha: for files without a config; None takes each layer's rank, as diffusers does.

    Raises:
        FormatError: the file is not there or not whole, or holds other components only.
    """
    tensors, metadata = read_tensors(path / TENSORS if path.is_dir() else path)
    config = _config(metadata, path)
    component = _component_in(tensors, config, index, path)
    own, said = (
        {key.removeprefix(component): v for key, v in of_all.items() if key.startswith(component)}
        for of_all in (tensors, config)
    )
    return _from_tensors(said, own, metadata, path, index, alpha)


def from_state(state: AdapterState, index: Index | None, alpha: float | None) -> AdapterData:
    """The same without a file.

    Raises:
        FormatError: as ``read``.
    """
    return _from_tensors(state.config, dict(state), state.metadata, IN_MEMORY, index, alpha)


def _from_tensors(
    config: Mapping[str, Any],
    own: dict[str, Tensor],
    metadata: Mapping[str, str],
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
        patterns = {f"^{re.escape(name)}": value for name, value in ranks.items()}
        scales = {f"^{re.escape(name)}": value for name, value in scale.items()}
        config = {"peft_type": "LORA", "r": 0, "lora_alpha": 1, "rank_pattern": patterns,
                  "alpha_pattern": scales}  # fmt: skip
    data = peft.from_tensors(config, own, metadata, path, index, alpha)
    return replace(data, facts={**data.facts, "format": "diffusers"})


def write(data: AdapterData, path: Path) -> None:
    """Write a directory, with a model card.

    Raises:
        FormatError: the adapter holds what PEFT cannot read, or the directory cannot be written.
    """
    for pair in data.pairs:
        if pair.has_own_shapes:
            pair.require_plain("diffusers' format")
    data.require_no_rows("diffusers' format")
    component = next((c for part, c in COMPONENTS.items() if part in data.model_class), "")
    prefix = f"{component}." if component else ""
    state = to_state(data)
    keys = {f"{prefix}{key}": value for key, value in state.items()}
    shown = {f"{prefix}{key}": value for key, value in state.config.items()}
    metadata = {"format": "pt", METADATA: json.dumps(shown, sort_keys=True), **state.metadata}
    cards = [path / CARD] if is_ours(path) else []
    with replaced_together(path / TENSORS, *cards) as (file, *rest):
        write_tensors(keys, file, metadata)
        for other in rest:
            write_text(card(data, path, "diffusers"), other)


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


def _component_in(
    tensors: dict[str, Tensor], config: Mapping[str, Any], index: Index | None, path: Path
) -> str:
    """The prefix of the component to read: the model's, or the only one in the file.

    A model may call a module of its own as a pipeline calls a component (GPT-2 has a
    ``transformer``): in the keys of a config there are no modules.
    """
    said = config or tensors
    there = [
        c
        for c in _ALL_COMPONENTS
        if any(key.startswith(f"{c}.") for key in tensors)
        and any(key.startswith(f"{c}.") for key in said)
    ]
    modules = set() if index is None else set(bare_modules(index.by_path))
    fitting = [c for c in there if any(_owner(key.removeprefix(f"{c}.")) in modules
                                       for key in tensors)]  # fmt: skip
    if index is not None and any(_owner(key) in modules for key in tensors):
        return ""
    choice = fitting or there
    if len(choice) > 1:
        raise FormatError(f"{path} holds several components, {choice}, and which is meant is open.")
    return f"{choice[0]}." if choice else ""


def _config(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """PEFT's configs of all components in one."""
    if METADATA not in metadata:
        return {}
    return parse_json(metadata[METADATA], f"the metadata of {path}")
