"""What somebody who saves or loads will hardly have meant: a warning each, with what to do."""

from pathlib import Path

from lora_inject.core.look import Look
from lora_inject.errors import warn
from lora_inject.files.formats import FORMATS, checkpoint
from lora_inject.files.formats.data import AdapterData
from lora_inject.printing import plural


def warn_of_untrained(data: AdapterData, name: str) -> None:
    """Warn of an adapter of which no pair has trained."""
    if data.pairs and all(pair.is_untrained for pair in data.pairs):
        warn(
            f"{name!r} was never trained: its A and B are what they began as, and change nothing. "
            "Where they should have been, build the optimizer after inject, with "
            "lora_parameters(model)."
        )


def warn_of_directory(path: Path, format: str) -> None:
    """Warn where a directory is about to be made under the name of a file."""
    files = [name for name, own in FORMATS.items() if path.suffix in own.SUFFIXES]
    if files and format not in files and not path.is_dir():
        warn(
            f"{path} becomes a directory, which {format!r} is. For a single file say "
            f"format={files[0]!r}, else leave {path.suffix} out."
        )


def warn_of_checkpoint(data: AdapterData, path: Path) -> None:
    """Say of a checkpoint of a whole model that it is one, and what of it was loaded."""
    if data.facts.get("format") == checkpoint.NAME:
        warn(
            f"{path} is a {checkpoint.NAME}, of which from_pretrained leaves the adapter out. What "
            f"is loaded is its adapter on {plural(len(data.pairs), 'layer')}, and of its base what "
            "differs from this model. save(model, path) writes an adapter alone."
        )


def warn_of_unused(look: Look, name: str) -> None:
    """Warn that an adapter that was loaded is not in use."""
    used = ", ".join(map(repr, look.used))
    warn(
        f"{name!r} is loaded and not in use, as {used} is: use(model, {name!r}) switches to it, "
        f"use(model, {used}, {name!r}) adds it."
    )
