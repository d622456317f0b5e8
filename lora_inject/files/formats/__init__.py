"""File formats of adapters: one file each, with a reader and a writer over ``AdapterData``."""

from pathlib import Path
from typing import Any

from torch import nn

from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files.formats import diffusers, kohya, loralib, peft
from lora_inject.files.formats.data import AdapterData
from lora_inject.settings import check_alpha

FORMATS: dict[str, Any] = {
    "peft": peft,
    "loralib": loralib,
    "kohya": kohya,
    "diffusers": diffusers,
}


def named_format(name: Any, argument: str) -> Any:
    """The format of this name.

    Raises:
        ArgumentError: there is none; the message starts with the argument's name.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise ArgumentError(f"{argument} must be one of {list(FORMATS)}, not {name!r}.")
    return FORMATS[name]


def read_adapter(
    path: Path, format: str | None, model: nn.Module | None, alpha: float | None
) -> AdapterData:
    """Read a file or directory that must hold an adapter.

    Raises:
        ArgumentError: an argument cannot be used.
        FormatError: it cannot be read, or holds no A and B.
    """
    alpha = None if alpha is None else check_alpha(alpha, "alpha")
    data: AdapterData = find_format(path, format).read(path, model, alpha)
    if not (data.pairs or data.rows):
        raise FormatError(f"{path} holds no A and B.")
    return data


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
    for format in FORMATS.values():
        if format.looks_like(path):
            return format
    raise FormatError(
        f"nothing tells the format of {path}.",
        remedy=f"Say it: one of {', '.join(FORMATS)}.",
    )
