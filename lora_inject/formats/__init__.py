"""File formats of adapters: one file each, with a reader and a writer over ``AdapterData``."""

from pathlib import Path
from typing import Any

from lora_inject.errors import ArgumentError, FormatError
from lora_inject.formats import diffusers, kohya, loralib, peft

FORMATS: dict[str, Any] = {
    "peft": peft,
    "loralib": loralib,
    "kohya": kohya,
    "diffusers": diffusers,
}


def find_format(path: Path, name: str | None = None) -> Any:
    """The format of a file or directory, by its name or by what it looks like.

    Raises:
        ArgumentError: there is no format of this name.
        FormatError: there is no such file, or nothing tells its format.
    """
    if name is not None:
        if not isinstance(name, str) or name not in FORMATS:
            raise ArgumentError(f"format must be one of {list(FORMATS)}, not {name!r}.")
        return FORMATS[name]
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
