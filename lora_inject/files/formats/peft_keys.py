"""What PEFT's files call the tensors of a model, and which tensor of it a key of a file is."""

import itertools
import re
from collections.abc import Container, Iterable, Mapping

from torch import Tensor

from lora_inject.files.formats.data import PairData
from lora_inject.kinds.base import Form

PREFIX = "base_model.model."
OUT_PROJ = ".base_layer.out_proj"  # of nn.MultiheadAttention, inside of PEFT's layer for it
# PEFT adds the update of an nn.MultiheadAttention's out_proj twice (merge of its MultiheadAttention
# layer, seen in 0.21): what a file means is what PEFT computes from it.
OUT_PROJ_TIMES = 2
# Some trainers leave the name of PEFT's own adapter in the key.
_PAIR = r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?(2)|\.weight)"
_WRAPPERS = r"base_layer|token_adapter|modules_to_save(?:\.default)?"
_MOST = 8  # more wrappers than PEFT nests: all of them are taken away then


def tensor_key(form: Form, path: str, letter: str) -> str:
    """The key of A or B of a module."""
    name = f"lora_embedding_{letter}" if form == "embedding" else f"lora_{letter}.weight"
    return f"{PREFIX}{path}.{name}"


def pair_key(key: str) -> tuple[str, str, bool] | None:
    """(path in the file, "A" or "B", whether of an embedding) of a key; None for other tensors."""
    match = re.fullmatch(_PAIR, key)
    return None if match is None else (match[1], match[3], bool(match[2]))


def is_like_ours(name: str) -> bool:
    """Whether a tensor of the base is called as one of an adapter, or of PEFT's wrappers, is."""
    return ".lora_" in f".{name}" or Names(()).tensor(name) != name


def base_key(name: str, pairs: Iterable[PairData]) -> str:
    """The key of a base tensor: PEFT keeps an adapted layer under ``base_layer``."""
    owner, _, tensor = name.rpartition(".")
    for pair in pairs:
        if pair.in_attention and owner == pair.path:
            head = owner.removesuffix(".out_proj")
            return f"{PREFIX}{head}{OUT_PROJ}.base_layer.{tensor}"
    nested = sum(pair.path == owner for pair in pairs)
    return f"{PREFIX}{owner}.{'base_layer.' * nested}{tensor}"


class Names:
    """The names that modules have without PEFT's wrappers.

    A module of the model may be called as a wrapper is: names that are known stay.

    Args:
        known: paths of modules, and the names of their tensors.
    """

    def __init__(self, known: Container[str]) -> None:
        self.known = known

    def module(self, path: str) -> str:
        """The module's path for one in a file; that of a wrapper at its end stays."""
        return self._without(path, r"\.(base_layer)(?=\.)")

    def tensor(self, key: str) -> str | None:
        """The name of a base tensor for its key; None for one that PEFT keeps and does not use."""
        name = self._without(key.removeprefix(PREFIX), rf"\.({_WRAPPERS})(?=\.)")
        return None if ".original_module." in name and name not in self.known else name

    def without(
        self, tensors: Mapping[str, Tensor], said: Container[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(The other tensors by key, those of the base that a file says by name).

        A module of the model may be called as the parts of an adapter are (``lora_B.bias``).
        """
        base = {key: name for key in tensors if (name := self.tensor(key)) in said}
        others = {key: tensor for key, tensor in tensors.items() if key not in base}
        return others, {name: tensors[key] for key, name in base.items() if name is not None}

    def adapted_weights(self, keys: Iterable[str]) -> list[str]:
        """The names of weights of adapted layers among the keys."""
        ends = [key for key in keys if key.endswith(".base_layer.weight")]
        names = {self.tensor(key): key.removeprefix(PREFIX) for key in ends}
        return [name for name, key in names.items() if name is not None and name != key]

    def is_out_proj(self, path: str) -> bool:
        """Whether a path in a file is the ``out_proj`` of a wrapped ``nn.MultiheadAttention``."""
        return path.endswith(OUT_PROJ) and path not in self.known

    def _without(self, path: str, wrapper: str) -> str:
        """The path without wrappers: with as many as make it one that is known, or with none."""
        found = [match.span() for match in re.finditer(wrapper, path)]
        for n in range(len(found) if len(found) <= _MOST else 0):
            for taken in itertools.combinations(found, n):
                name = _cut(path, taken)
                if name in self.known:
                    return name
        return _cut(path, found)


def _cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    for start, end in sorted(spans, reverse=True):
        text = text[:start] + text[end:]
    return text
