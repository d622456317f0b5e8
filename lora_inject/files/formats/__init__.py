"""File formats of adapters: one file each, with a reader and a writer over ``AdapterData``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files.formats import checkpoint, diffusers, gguf, kohya, loralib, peft
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.formats.diffusers import TENSORS as IN_DIFFUSERS
from lora_inject.files.formats.peft_config import CONFIG, TENSORS
from lora_inject.files.formats.peft_keys import PREFIX
from lora_inject.files.formats.state import AdapterState
from lora_inject.files.formats.storage import tensor_names
from lora_inject.settings import check_alpha

FORMATS: dict[str, Any] = {
    "peft": peft,
    "loralib": loralib,
    "kohya": kohya,
    "diffusers": diffusers,
    "gguf": gguf,
}
# Kohya's: any other safetensors file.
_BY_CONTENT = (peft, loralib, diffusers, checkpoint, kohya)


def named_format(name: Any, argument: str) -> Any:
    """The format of this name.

    Raises:
        ArgumentError: there is none; the message starts with the argument's name.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise ArgumentError(f"{argument} must be one of {list(FORMATS)}, not {name!r}.")
    return FORMATS[name]


def read_adapter(
    path: Path, format: str | None, index: Index | None, alpha: float | None
) -> AdapterData:
    """Read a file or directory that must hold an adapter.

    Raises:
        ArgumentError: an argument cannot be used.
        FormatError: it cannot be read, or holds no A and B.
    """
    alpha = None if alpha is None else check_alpha(alpha, "alpha")
    data: AdapterData = find_format(path, format).read(path, index, alpha)
    if not (data.pairs or data.tables):
        raise FormatError(f"{path} holds no A and B.")
    return data


def read_state(
    tensors: Mapping[str, Tensor],
    format: str | None,
    config: Mapping[str, Any] | None,
    index: Index,
    alpha: float | None,
) -> AdapterData:
    """What tensors by a format's keys say, which come without a file.

    Raises:
        ArgumentError: their format is not said, or is one that is read from files alone.
        FormatError: they cannot be read, or hold no A and B.
    """
    own = tensors if isinstance(tensors, AdapterState) else None
    name = format or (own.format if own else None)
    if name is None or not hasattr(named_format(name, "format"), "from_state"):
        raise ArgumentError(
            f"format must be one of {in_memory()} for tensors without a file, not {name!r}.",
            remedy="load_lora_state_dict takes what lora_state_dict returns without a format.",
        )
    if own is None or config is not None:
        own = AdapterState(tensors, name, config or {}, {})
    alpha = None if alpha is None else check_alpha(alpha, "alpha")
    data: AdapterData = named_format(name, "format").from_state(own, index, alpha)
    if not data.pairs:
        raise FormatError("the state dict holds no A and B.")
    return data


def in_memory() -> list[str]:
    """The formats that a state dict can have without a file."""
    return [name for name, format in FORMATS.items() if hasattr(format, "to_state")]


def find_format(path: Path, name: str | None = None) -> Any:
    """The format of a file or directory, by its name or by what it looks like.

    Raises:
        ArgumentError: there is no format of this name.
        FormatError: there is no such file, or nothing tells its format.
    """
    if name is not None:
        return named_format(name, "format")
    try:
        there = path.exists()
    except (OSError, ValueError):  # names that no file system takes
        there = False
    if not there:
        raise FormatError(f"there is no file or directory {str(path)[:200]}.")
    for format in _BY_CONTENT:
        if format.looks_like(path):
            if format is kohya and any(n.startswith(PREFIX) for n in tensor_names(path)):
                raise FormatError(
                    f"{path} has the keys of PEFT, and its config says what they mean.",
                    remedy=f"Give the directory that has both, with the names {CONFIG} and "
                    f"{TENSORS}.",
                )
            return format
    if path.name == CONFIG:
        raise FormatError(f"{path} holds no tensors.", remedy="Give the directory that it is in.")
    if path.is_dir():
        raise FormatError(
            f"{path} holds no adapter: there is neither {CONFIG} (PEFT) nor {IN_DIFFUSERS}.",
            remedy="Give the directory that save was given, or the file itself.",
        )
    raise FormatError(
        f"nothing tells the format of {path}.",
        remedy=f"If it is an adapter, say what it is: one of {', '.join(FORMATS)}.",
    )
