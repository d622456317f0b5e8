"""Save an adapter to disk, in any format; all or nothing."""

from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import nn

from lora_inject.errors import ArgumentError
from lora_inject.files import left_out
from lora_inject.files.formats import named_format
from lora_inject.files.formats.pairs import as_portable
from lora_inject.files.stored import Stored
from lora_inject.files.token_rows import warn_of_unsaved_rows
from lora_inject.sharding import is_distributed, on_first_rank


def save(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    adapter: str | None = None,
    format: str = "peft",
    portable: bool = False,
) -> None:
    """Save an adapter: A, B, and the biases and modules that it trained.

    The default is a PEFT directory, which PEFT, vLLM and diffusers read. A save that is interrupted
    leaves the files that were there. Of a sharded model all ranks must call this; what is the
    adapter's is gathered, and the first rank writes.

    Example:
        >>> save(model, "adapter")  # doctest: +SKIP

    Args:
        model: an adapted model, or a wrapper that holds it.
        path: a directory for "peft" and "diffusers", a file for the others; made if need be.
        adapter: the adapter's name; None for the only one there is, or the only one in use.
        format: "peft", "loralib" (a .pt file), "kohya" or "diffusers".
        portable: write one rank and a scaling of 1 for all layers, for readers that know no
            patterns (vLLM): ranks are padded with zeros and scalings folded into B.

    What trains in the model and is not the adapter's, such as a head beside what was injected, is
    not in the file: a ``LoRAInjectWarning`` names it.

    Raises:
        ArgumentError: the format or the adapter is not known.
        FormatError: the format has no word for something of the adapter, or the path cannot be
            written to. Nothing has been written then.
        LoRAInjectError: the model has no adapters, is merged or inside a block.
    """
    named_format(format, "format")
    file, stored = as_path(path), Stored(model, adapter)
    left_out.warn_of_left_out(stored.look, "the file")
    write(stored, file, format, portable=portable)


def write(stored: Stored, file: Path, format: str = "peft", *, portable: bool = False) -> None:
    """Write an adapter to a file, or on the first rank of those that hold its shards."""
    writer, data = named_format(format, "format"), stored.data()
    warn_of_unsaved_rows(stored.look, stored.paths, data.tensors)
    left_out.warn_of_unsaid_others(data, stored.name, format)
    write = partial(writer.write, as_portable(data) if portable else data, file)
    if any(is_distributed(tensor) for tensor in stored.tensors().values()):
        on_first_rank(write)
    else:
        write()


def as_path(path: Any) -> Path:
    """A path, of whatever says one.

    Raises:
        ArgumentError: it does not.
    """
    try:
        return Path(fspath(path))
    except TypeError as error:
        raise ArgumentError(f"path must be a path, not {path!r}.") from error
