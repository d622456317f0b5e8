"""GGUF files with a LoRA, as llama.cpp reads them: they are written, and not read.

By llama.cpp's convert_lora_to_gguf.py and llama-adapter.cpp: the names are those of the package
``gguf``, the tensors float32; experts stand in one tensor (E, r, in) and (E, out, r). There is one
alpha for all, divided by the rank of each tensor: what another scaling needs goes into B.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import whole_layers
from lora_inject.files.formats.storage import replaced_together

SUFFIXES = (".gguf",)
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_EMBEDDING = "token_embd"


class _Architecture(NamedTuple):
    """What llama.cpp calls an architecture, and whether it turns the rows of q and k.

    Its rotary embedding pairs neighbours there, and transformers' the two halves of a head.
    """

    name: str
    turns: bool = False


# By the class of transformers; what is not here llama.cpp may store in other ways.
_ARCHITECTURES = {
    **dict.fromkeys(
        ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        _Architecture("llama", turns=True),
    ),
    "Qwen2ForCausalLM": _Architecture("qwen2"),
    "Qwen2MoeForCausalLM": _Architecture("qwen2moe"),
    "Qwen3ForCausalLM": _Architecture("qwen3"),
    "Qwen3MoeForCausalLM": _Architecture("qwen3moe"),
    "GemmaForCausalLM": _Architecture("gemma"),
    "Gemma2ForCausalLM": _Architecture("gemma2"),
    "Phi3ForCausalLM": _Architecture("phi3"),
}


def looks_like(path: Path) -> bool:
    """Nothing does, as none is read."""
    return False


def read(path: Path, index: Index | None = None, alpha: float | None = None) -> AdapterData:
    """Refuse.

    Raises:
        FormatError: always.
    """
    raise FormatError(
        f"{path}: GGUF files are written for llama.cpp, and not read.",
        remedy="Load the adapter that it was made of.",
    )


def write(data: AdapterData, path: Path) -> None:
    """Write a GGUF file.

    Args:
        data: an adapter by the names of its model's checkpoint, with the sizes of the model.
        path: the file.

    Raises:
        FormatError: the model or something of the adapter is nothing that llama.cpp can adapt, the
            package is missing, or the file cannot be written.
    """
    gguf = _package()
    architecture = _ARCHITECTURES.get(data.model_class)
    if architecture is None:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in _ARCHITECTURES)
        raise FormatError(
            f"how llama.cpp stores a {data.model_class or 'model that is not given'} is not known.",
            remedy=f"Give its config (--base CONFIG), if it is one of {known}; else save it with "
            "portable=True, and let llama.cpp's convert_lora_to_gguf.py convert that.",
        )
    _require_pairs_alone(data)
    pairs = whole_layers(data.pairs)
    alpha = Counter(pair.scaling * pair.rank for pair in pairs).most_common(1)[0][0]
    names = _names(gguf, architecture, data)
    tensors: dict[str, Tensor] = {}
    for path_there, A, B in _stacked(pairs, alpha):
        name = names.get_name(path_there)
        if name is None:
            raise FormatError(f"llama.cpp has no tensor for {path_there} in {architecture.name}.")
        if architecture.turns:
            B = _turned(B, path_there, data.sizes)
        tensors[f"{name}.weight.lora_a"] = A.T if name == _EMBEDDING else A
        tensors[f"{name}.weight.lora_b"] = B
    with (
        replaced_together(path) as (file,),
        closing(gguf.GGUFWriter(file, architecture.name)) as writer,
    ):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for key, tensor in sorted(tensors.items()):
            writer.add_tensor(key, tensor.detach().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _package() -> ModuleType:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise FormatError(
            "GGUF files are written by the package gguf, which is not installed.",
            remedy='Install it: pip install "lora_inject[gguf]".',
        ) from error


def _require_pairs_alone(data: AdapterData) -> None:
    """Refuse what llama.cpp has no place for.

    Raises:
        FormatError: there is such.
    """
    data.require_no_rows("llama.cpp")
    if data.tensors:
        raise FormatError(
            f"{next(iter(data.tensors))} was trained in place, for which llama.cpp has no word.",
            remedy="Merge the adapter, and convert the whole model.",
        )
    tied = data.sizes.get("tied", 0)
    for pair in data.pairs:
        pair.require_plain("llama.cpp", "Write it with portable=True, r=16, error=0.1.")
        plain = pair.form in ("linear", "embedding") and pair.weight == "weight"
        of_table = pair.path.endswith(("embed_tokens", "lm_head"))
        if not plain or pair.in_attention or pair.path.endswith("shared_expert_gate"):
            raise FormatError(f"{pair.name} is nothing that llama.cpp can adapt.")
        if tied and of_table:
            raise FormatError(f"{pair.name} is tied, and llama.cpp has one tensor for both places.")


def _names(gguf: ModuleType, architecture: _Architecture, data: AdapterData) -> Any:
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    return gguf.get_tensor_name_map(number, data.sizes["layers"])


def _stacked(pairs: list[PairData], alpha: float) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path, A, B) of each tensor of llama.cpp, with this alpha for all."""
    experts: dict[str, dict[int, PairData]] = {}
    for pair in pairs:
        if match := _EXPERT.fullmatch(pair.path):
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = pair
        else:
            yield pair.path, pair.A.float(), _scaled(pair, alpha)
    for path, own in experts.items():
        in_order = [own[e] for e in sorted(own)]
        yield (
            path,
            torch.stack([pair.A.float() for pair in in_order]),
            torch.stack([_scaled(pair, alpha) for pair in in_order]),
        )


def _scaled(pair: PairData, alpha: float) -> Tensor:
    """B for a scaling of alpha by its rank.

    Raises:
        FormatError: that is too large for float32.
    """
    factor = pair.scaling * pair.rank / alpha
    B = pair.B.float() if factor == 1 else (pair.B.double() * factor).float()
    if not B.isfinite().all():
        raise FormatError(f"{pair.name}: B times {factor:g} is too large.")
    return B


def _turned(B: Tensor, path: str, sizes: Mapping[str, int]) -> Tensor:
    """B of q or k with the two halves of each head interleaved."""
    heads = {"q_proj": "heads", "k_proj": "key_heads"}.get(path.rpartition(".")[2])
    if heads is None:
        return B
    return B.reshape(sizes[heads], 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)
