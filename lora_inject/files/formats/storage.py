"""Files on disk: tensors read without running anything, and written so that a crash loses nothing.

Every problem with a file is one ``FormatError`` that names it. safetensors is imported where it is
used, so that importing the library does not pay for it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import ArgumentError, FormatError, warn
from lora_inject.files.formats.data import is_plain
from lora_inject.files.formats.digests import (
    DIGESTS,
    digests_of,
    require_as_written,
    require_whole_archive,
)

MOST_TENSORS = 200_000  # far above any adapter; a header of millions is an attack
MOST_BYTES = 200 * MOST_TENSORS  # of the header, which is read into memory before it is known


_LFS = b"version https://git-lfs."  # how the spec says that a pointer begins


def as_path(path: Any, argument: str = "path") -> Path:
    """A path from what a user gives for one.

    Raises:
        ArgumentError: it is none.
    """
    try:
        return Path(fspath(path))
    except TypeError as error:
        swapped = "The model comes first." if isinstance(path, nn.Module) else ""
        raise ArgumentError(
            f"{argument} must be a path, not a {type(path).__name__}.", remedy=swapped
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FormatError: there is no such file, it is no safetensors file that is whole, or values are
            not those that this library has written.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    require_as_written(tensors, metadata.pop(DIGESTS, ""), path)
    return _with_usable_dtypes(tensors, path), metadata


def tensor_names(path: Path) -> list[str]:
    """The names of the tensors of a safetensors file.

    Raises:
        FormatError: there is no such file, or it is no safetensors file that is whole.
    """
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with its errors as ours."""
    import safetensors

    require_file(path)
    try:
        with path.open("rb") as start:
            if (size := int.from_bytes(start.read(8), "little")) > MOST_BYTES:
                raise FormatError(f"{path} has a header of {size:,} bytes, which is no adapter.")
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            if (count := len(file.keys())) > MOST_TENSORS:
                raise FormatError(f"{path} holds {count:,} tensors, which is no adapter.")
            yield file
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is no whole safetensors file: {error}.") from error


def _with_usable_dtypes(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors with those of 8 bits, which nothing is computed in, in 16."""
    small = {n: t for n, t in tensors.items() if str(t.dtype).startswith("torch.float8")}
    if small:
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in small.values()}))
        warn(
            f"{path}: {len(small):,} tensors are of {dtypes}, and are read as bfloat16, which "
            "holds their values exactly."
        )
    return tensors | {name: tensor.to(torch.bfloat16) for name, tensor in small.items()}


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by ``torch.save``; nothing that could run code is unpickled.

    Raises:
        FormatError: there is no such file, it is not whole, or is no dict of tensors alone.
    """
    require_file(path)
    require_whole_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors are of any type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        arrays = " Of numpy arrays torch.from_numpy makes tensors." if "numpy" in str(error) else ""
        raise FormatError(
            f"{path} is no file of tensors alone: {reason}",
            remedy=f"It was not unpickled: doing so could run code.{arrays}",
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise FormatError(f"{path} does not hold a dict of tensors.")
    if repeated := [name for name, tensor in state.items() if _repeats(tensor)]:
        raise FormatError(
            f"{path}: {repeated[0]} is larger than the values that the file has for it.",
            remedy="Save a copy of it: tensor.clone().",
        )
    return _with_usable_dtypes(dict(state), path)


def _repeats(tensor: Tensor) -> bool:
    """Whether a tensor shows values of its storage more than once, and so may be of any size."""
    return is_plain(tensor) and tensor.nbytes > tensor.untyped_storage().nbytes()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: there is no such file, or it holds something else.
    """
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a byte order mark in front
    except (ValueError, OSError) as error:
        raise FormatError(f"{path} is no JSON file: {error}.") from error
    return parse_json(text, str(path))


def parse_json(text: str, what: str) -> dict[str, Any]:
    """The JSON object that a text is; ``what`` is for errors.

    Raises:
        FormatError: it is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object.")
    return value


def require_file(path: Path) -> None:
    """Refuse a path that is no file.

    Raises:
        FormatError: it is a directory, or not there.
    """
    if path.is_dir():
        raise FormatError(f"{path} is a directory, and a file is needed.")
    if not path.is_file():
        raise FormatError(f"there is no file {path}.")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise FormatError(
                f"{path} is a pointer of git-lfs, and not the file that it stands for.",
                remedy="Run git lfs pull where it was cloned.",
            )


@contextmanager
def replaced_together(*targets: Path) -> Iterator[list[Path]]:
    """Write files that belong together: all of them replace the former ones, or none does.

    They are written beside their places under other names, and take them when the block has ended
    well. Where that fails half-way, the former ones are put back.

    Yields:
        The paths to write to.

    Raises:
        FormatError: the directory cannot be made or written to.
    """
    made: list[Path] = []
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise FormatError(f"{target} is a directory.")
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            os.close(handle)
            made.append(Path(name))
        yield made
        _take_places(made, targets)
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{targets[0].parent} cannot be written to: {error}.") from error
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _take_places(made: list[Path], targets: tuple[Path, ...]) -> None:
    for path in made:
        path.chmod(0o666 & ~_umask())  # mkstemp's are private
        with path.open("rb") as file:
            os.fsync(file.fileno())
    former: list[tuple[Path, Path]] = []
    try:
        for target in targets:
            if target.exists():
                handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
                os.close(handle)
                kept = Path(name)
                shutil.copy2(target, kept)  # the place itself is never empty
                former.append((kept, target))
        for path, target in zip(made, targets, strict=True):
            os.replace(path, target)
    except BaseException:
        for kept, target in former:
            os.replace(kept, target)
        raise
    for kept, _ in former:
        kept.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file of contiguous copies on the CPU, with a digest of each."""
    import safetensors.torch

    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    digests = {DIGESTS: digests_of(whole)}
    safetensors.torch.save_file(whole, path, metadata=metadata | digests)


def write_text(text: str, path: Path) -> None:
    """A text file, in UTF-8."""
    path.write_text(text, encoding="utf-8")


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """A JSON object, indented."""
    write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", path)
