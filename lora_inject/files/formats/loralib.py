"""loralib's checkpoints: a dict of ``<path>.lora_A`` and ``<path>.lora_B`` by ``torch.save``.

They say no alpha: in loralib it is part of the code. They tell an embedding from a Linear layer as
little; with a model at hand that is looked up in it. Nor do they say which parts of a fused
projection are adapted: that is looked up in the adapter that the model has.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.merged_linear import is_merged, merged
from lora_inject.files.formats.pairs import by_layer
from lora_inject.files.formats.storage import read_pickled, replaced_together
from lora_inject.kinds.base import Form
from lora_inject.variants import SCALINGS

_KEY = r"(?:(.+)\.)?(?:(\w+?)_)?lora_([AB])"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")  # of its files


def looks_like(path: Path) -> bool:
    """Whether it is called as torch's checkpoints are."""
    return path.is_file() and path.suffix in SUFFIXES


def read(path: Path, index: Index | None = None, alpha: float | None = None) -> AdapterData:
    """Read a checkpoint; nothing but tensors is unpickled.

    Args:
        path: the file.
        index: the modules of the model that it is for, which tells embeddings and parts.
        alpha: the alpha of every layer, which the file does not say.

    Raises:
        FormatError: the file is not there, not whole or no dict of tensors.
    """
    return from_tensors(read_pickled(path), path, index, alpha)


def from_tensors(
    state: Mapping[str, Tensor], path: Path, index: Index | None, alpha: float | None
) -> AdapterData:
    """What tensors by loralib's keys say; ``path`` is for errors.

    Raises:
        FormatError: one half of a pair is missing.
    """
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = re.fullmatch(_KEY, key)
        if match is None:
            tensors[key] = tensor
        else:
            halves.setdefault((match[1] or "", match[2] or ""), {})[match[3]] = tensor
    pairs = []
    modules = {} if index is None else bare_modules(index.by_path)
    for (owner, prefix), half in halves.items():
        if half.keys() != {"A", "B"}:
            raise FormatError(f"{path}: {owner} has only one of lora_A and lora_B.")
        A, B = half["A"], half["B"]
        module = modules.get(owner)
        form: Form = "embedding" if isinstance(module, nn.Embedding) else "linear"
        form = "conv" if A.dim() > 2 and not prefix else form
        if prefix and module is not None and prefix in module._parameters:
            form = "experts"
        weight = prefix or ("" if form == "linear" and is_merged(A, B) else "weight")
        pairs.append(PairData(owner, A, B, alpha, form, weight=weight))
    return AdapterData(tuple(pairs), tensors, bias="", facts={"format": "loralib"})


def write(data: AdapterData, path: Path) -> None:
    """Write a checkpoint.

    Raises:
        FormatError: parts are not those of a ``MergedLinear``, or the file cannot be written.
    """
    data.require_no_rows("loralib's format")
    tensors: dict[str, Tensor] = {}
    for own in by_layer(data.pairs):
        for pair in own:
            pair.require_plain("loralib's format")
        own = [_by_rank(pair) for pair in own]
        A, B = merged(own) if own[0].part else (own[0].A, own[0].B)
        key = replace(own[0], part="").key
        tensors |= {f"{key}lora_A": A, f"{key}lora_B": B}
    tensors |= data.tensors
    state = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    with replaced_together(path) as (file,):
        torch.save(state, file)


def _by_rank(pair: PairData) -> PairData:
    """The same where readers take alpha / r of the file, with the adapter's own alpha.

    Another rule of scaling, or the rank of a start that is subtracted, goes into B.
    """
    alpha = SCALINGS[pair.rule].alpha(pair.scaling, pair.own_rank)
    factor = pair.scaling * pair.rank / alpha
    return pair if math.isclose(factor, 1.0) else replace(pair, B=pair.B * factor)
