"""Trainable rows in PEFT's files: its ``trainable_token_indices``, and its TRAINABLE_TOKENS.

What PEFT calls ``trainable_tokens_delta`` are the rows themselves, and no difference to the base's.
Beside LoRA the ids stand in LoRA's config, and every embedding has its own. Alone they are an
adapter of another type, with one list of ids.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_inject.core.request import row_settings
from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files.formats.data import AdapterData, RowsData

ALONE = "TRAINABLE_TOKENS"
WRAPPER = "token_adapter"  # what PEFT puts around such a layer beside LoRA
_NAME = "trainable_tokens_delta"
_KEY = rf"(?:base_model\.model\.)?(?:(.+)\.)?{_NAME}"


def without_rows(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: object
) -> tuple[dict[str, Tensor], tuple[RowsData, ...]]:
    """The tensors of a file without trainable rows, and these.

    Raises:
        FormatError: the config and the tensors do not fit each other.
    """
    rest: dict[str, Tensor] = {}
    rows: list[RowsData] = []
    for key, tensor in tensors.items():
        match = re.fullmatch(_KEY, key)
        if match is None:
            rest[key] = tensor
            continue
        path = (match[1] or "").removesuffix(WRAPPER).removesuffix(".")
        ids = _ids_of(path, config, where)
        if tensor.dim() != 2 or tensor.shape[0] != len(ids):
            raise FormatError(f"{where}: {key} is {tuple(tensor.shape)}, for {len(ids)} ids.")
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rows.append(RowsData(path, tuple(ids[i] for i in order), tensor[order]))
    if not rows and (config.get("trainable_token_indices") or config.get("token_indices")):
        raise FormatError(f"{where}: its config tells of trainable tokens, and there are none.")
    return rest, tuple(rows)


def _ids_of(path: str, config: Mapping[str, Any], where: object) -> list[int]:
    """The ids that the config gives a layer, in the order of its rows."""
    given = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if path.endswith(name)), None)
    try:
        row_settings(given, f"{where}: the ids of {path}")
    except ArgumentError as error:
        raise FormatError(str(error)) from error
    return [*given]  # type: ignore[misc]


def keys_of(data: AdapterData, prefix: str) -> dict[str, Tensor]:
    """The rows by PEFT's keys."""
    wrapper = f"{WRAPPER}." if data.pairs else ""
    return {f"{prefix}{own.path}.{wrapper}{_NAME}": own.rows for own in data.tables}


def words_of(data: AdapterData) -> dict[str, Any]:
    """What a config of LoRA says of rows.

    Raises:
        FormatError: PEFT, which goes by the ends of names, would take another module too.
    """
    paths = [own.path for own in data.tables]
    for path in data.modules or ():
        if path not in paths and path.endswith(tuple(paths)):
            raise FormatError(f"PEFT would take {path} for one of {paths}, of which rows train.")
    return {"trainable_token_indices": {r.path: [*r.ids] for r in data.tables}} if paths else {}


def config_alone(data: AdapterData) -> dict[str, Any]:
    """The config of an adapter of rows alone.

    Raises:
        FormatError: it holds what PEFT has no word for there.
    """
    lists = dict.fromkeys(own.ids for own in data.tables)
    if len(lists) > 1:
        raise FormatError(
            "without LoRA beside them PEFT has one list of ids for all layers, and here are "
            f"{len(lists)}.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
    if data.tensors:
        raise FormatError(
            "without LoRA beside them PEFT trains rows and nothing else, and "
            f"{next(iter(data.tensors))} was trained too.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
    words_of(data)
    return {
        "peft_type": ALONE,
        "task_type": data.task or None,
        "base_model_name_or_path": data.base_name or None,
        "target_modules": [own.path for own in data.tables if not own.follows],
        "token_indices": [*next(iter(lists))],
        "init_weights": True,
        "inference_mode": True,
    }


def in_wrapper(name: str, data: AdapterData) -> str:
    """The key of a base tensor of a layer that has rows, which PEFT keeps inside of its wrapper."""
    owner, _, tensor = name.rpartition(".")
    inside = any(own.path == owner for own in data.tables)
    return f"{owner}.{WRAPPER}.base_layer.{tensor}" if inside else name
