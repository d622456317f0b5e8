"""A digest of each tensor in a file's metadata: bytes that changed on the way are told in loading.

``torch.save`` has checksums of its own, which torch does not compare. Files without any load as
before. What another tool has given another shape or dtype since, or
added, is not compared: it has written the file anew, and left our metadata in it.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.printing import few

DIGESTS = "lora_inject_digests"  # the key in the metadata


def digests_of(tensors: Mapping[str, Tensor]) -> str:
    """The digests of tensors on the CPU, by name, for the metadata."""
    return json.dumps({name: [_form(t), _digest(t)] for name, t in tensors.items()}, sort_keys=True)


def require_as_written(tensors: Mapping[str, Tensor], digests: str, path: Path) -> None:
    """Refuse tensors of which a digest was written and that have other bytes.

    Args:
        tensors: what was read.
        digests: what the metadata says, or "".
        path: the file, for errors.

    Raises:
        FormatError: there are such, by name.
    """
    if not digests:
        return
    try:
        written = {name: (form, digest) for name, (form, digest) in json.loads(digests).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path}: the digests in its metadata cannot be read.") from error
    wrong = [
        name
        for name, tensor in tensors.items()
        if name in written and written[name][0] == _form(tensor)
        if written[name][1] != _digest(tensor)
    ]
    if wrong:
        raise FormatError(
            f"{path} is damaged: {few(wrong)} have other values than were saved.",
            remedy="Copy or save it again. If a tool has changed the values on purpose, let it "
            f"leave out the metadata {DIGESTS!r}.",
        )


def require_whole_archive(path: Path) -> None:
    """Refuse a file by ``torch.save`` of which a part has another checksum than when it was saved.

    And one of which more would come out than is in it.

    Raises:
        FormatError: it has.
    """
    if not zipfile.is_zipfile(path):
        return  # the form from before torch 1.6
    packed = False
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            packed = sum(part.file_size for part in parts) > path.stat().st_size
            known = any(part.CRC for part in parts)  # torch can leave them out
            wrong = archive.testzip() if known and not packed else None
    except Exception as error:  # of any type, where an archive is broken
        wrong = str(error)
    if packed:
        raise FormatError(f"{path} is compressed, and could grow without end: torch packs nothing.")
    if wrong:
        raise FormatError(
            f"{path} is damaged: {wrong} in it is not what was saved.",
            remedy="Copy or save it again.",
        )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _digest(tensor: Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=8).hexdigest()
