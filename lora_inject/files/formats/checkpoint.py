"""Checkpoints of whole models with A and B in them, as ``save_pretrained`` writes an adapted one.

``from_pretrained`` gives the base model alone, since A and B are no parameters of its class. Here
they are read by loralib's keys, and of the base what differs from the model. Alpha is said nowhere.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.formats import loralib
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.formats.storage import read_json, read_pickled, read_tensors, tensor_names
from lora_inject.own import own_tensor

NAME = "checkpoint of a whole model"
_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
_PAIR = re.compile(r"((?:.*\.)?(?:\w+_)?lora_[AB])(?:_(\w+))?")  # and the adapter's name
_REMEDY = "Call inject with the arguments of then, and model.load_state_dict with its tensors."


def looks_like(path: Path) -> bool:
    """Whether it is a directory with the weights of a model, or a file with loralib's keys."""
    if path.is_file() and path.suffix == ".safetensors":
        return any(_PAIR.fullmatch(key) for key in tensor_names(path))
    return path.is_dir() and any(True for _ in _files_in(path))


def read(path: Path, index: Index | None = None, alpha: float | None = None) -> AdapterData:
    """Read a directory, or a file in it.

    Args:
        path: the directory, or a file.
        index: the model that it is for, of which equal tensors of the base are not kept.
        alpha: the alpha of every layer, which is said nowhere.

    Raises:
        FormatError: a file is not whole, there are no A and B, or they are of no plain LoRA.
    """
    modules = {} if index is None else bare_modules(index.by_path)
    found: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else dict.fromkeys(_files_in(path)):
        tensors = read_pickled(file) if file.suffix == ".bin" else read_tensors(file)[0]
        for key, tensor in tensors.items():
            owner, _, name = key.rpartition(".")
            here = own_tensor(modules[owner], name) if owner in modules else None
            if "lora_" in name or here is None or not _is_same(here, tensor):
                found[key] = tensor
    data = loralib.from_tensors(_of_one_adapter(found, path), path, index, alpha)
    weights = frozenset(f"{pair.path}.{pair.weight}" for pair in data.pairs)
    return replace(data, facts={"format": NAME, "base_weights": weights})


def _is_same(here: Tensor, tensor: Tensor) -> bool:
    return here.dtype == tensor.dtype and torch.equal(here.detach().cpu(), tensor)


def _files_in(folder: Path) -> Iterator[Path]:
    """The files with weights that a directory has, or that its index names."""
    for name in _FILES:
        if (folder / name).is_file():
            yield folder / name
        elif (folder / f"{name}.index.json").is_file():
            parts = read_json(folder / f"{name}.index.json").get("weight_map", {})
            names = parts.values() if isinstance(parts, dict) else ()
            yield from (folder / Path(str(part)).name for part in names)


def _of_one_adapter(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same with the keys of the only adapter as those of one without a name.

    Raises:
        FormatError: there is none, there are several, or it is more than A and B.
    """
    ours = {key: _PAIR.fullmatch(key) for key in tensors if "lora_" in key.rpartition(".")[2]}
    if not ours:
        raise FormatError(f"{path} is a {NAME}, and there are no A and B in it.")
    other = next((key for key, match in ours.items() if match is None), None)
    if other is not None:
        raise FormatError(f"{path} is a {NAME}, and {other} is of no plain LoRA.", remedy=_REMEDY)
    names = {match[2]: match for match in ours.values() if match}
    if len(names) > 1:
        known = sorted(name or "default" for name in names)
        raise FormatError(f"{path} is a {NAME} with several adapters, {known}.", remedy=_REMEDY)
    return {match[1] if (match := ours.get(key)) else key: t for key, t in tensors.items()}
