"""loralib's checkpoints: a dict of ``<path>.lora_A`` and ``<path>.lora_B`` by ``torch.save``.

They say no alpha: in loralib it is part of the code. They tell an embedding from a Linear layer as
little; with a model at hand that is looked up in it.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.storage import read_pickled, replaced_together
from lora_inject.kinds.base import Form

_KEY = r"(?:(.+)\.)?(?:(\w+?)_)?lora_([AB])"


def looks_like(path: Path) -> bool:
    """Whether it is called as torch's checkpoints are."""
    return path.is_file() and path.suffix in (".pt", ".pth", ".bin", ".ckpt")


def read(path: Path, model: nn.Module | None = None, alpha: float | None = None) -> AdapterData:
    """Read a checkpoint; nothing but tensors is unpickled.

    Args:
        path: the file.
        model: the model that it is for, which tells embeddings and parts.
        alpha: the alpha of every layer, which the file does not say.

    Raises:
        FormatError: the file is not there, not whole or no dict of tensors.
    """
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in read_pickled(path).items():
        match = re.fullmatch(_KEY, key)
        if match is None:
            tensors[key] = tensor
        else:
            halves.setdefault((match[1] or "", match[2] or ""), {})[match[3]] = tensor
    pairs = []
    modules = {} if model is None else bare_modules(Index(model).by_path)
    for (owner, prefix), half in halves.items():
        if half.keys() != {"A", "B"}:
            raise FormatError(f"{path}: {owner} has only one of lora_A and lora_B.")
        A, B = half["A"], half["B"]
        module = modules.get(owner)
        form: Form = "embedding" if isinstance(module, nn.Embedding) else "linear"
        form = "conv" if A.dim() > 2 and not prefix else form
        if prefix and module is not None and prefix in module._parameters:
            form = "experts"
        pairs.append(PairData(owner, A, B, alpha, form, weight=prefix or "weight"))
    return AdapterData(tuple(pairs), tensors, bias="", facts={"format": "loralib"})


def write(data: AdapterData, path: Path) -> None:
    """Write a checkpoint.

    Raises:
        FormatError: the file cannot be written.
    """
    data.require_no_rows("loralib's format")
    for pair in data.pairs:
        pair.require_plain("loralib's format")
    state = {
        f"{pair.key}lora_{letter}": tensor.detach().cpu().contiguous().clone()
        for pair in data.pairs
        for letter, tensor in (("A", pair.A), ("B", pair.B))
    }
    state |= {name: tensor.detach().cpu().clone() for name, tensor in data.tensors.items()}
    with replaced_together(path) as (file,):
        torch.save(state, file)
