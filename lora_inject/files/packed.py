"""Projections that engines read as one: a file for them has all of a group, or none.

SGLang puts q, k and v, and gate and up, side by side; vLLM and llama.cpp the experts' gate, up and
down. Where one of a group is adapted and another is not, the latter gets an update of zero.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.state import adapters_of
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.kinds import find_kind
from lora_inject.kinds.linear import LinearKind
from lora_inject.kinds.parameter import layout_of

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


class FusedWeight(NamedTuple):
    """The weight of all experts of a layer.

    Attributes:
        W: the weight, (E, out, in) or (E, in, out).
        n_in: how many features go in.
        n_out: how many come out.
    """

    W: Tensor
    n_in: int
    n_out: int


def fused_weights(module: nn.Module) -> dict[str, FusedWeight]:
    """Those of a module by name, where it says which way round they stand."""
    ours = {name for adapter in adapters_of(module) for name in adapter.parameters}
    found = {}
    for name, W in module._parameters.items():
        if W is not None and W.dim() == 3 and name not in ours:
            layout, (_, rows, columns) = layout_of(module, W), W.shape
            if layout is not None:
                n_in, n_out = (columns, rows) if layout == "out_in" else (rows, columns)
                found[name] = FusedWeight(W, n_in, n_out)
    return found


def partners(path: str, modules: Iterable[str]) -> tuple[str, ...]:
    """The paths of a module's group, its own among them; none of one that has none."""
    above, _, name = path.rpartition(".")
    for group in (QKV, GATE_UP):
        paths = tuple(f"{above}.{own}".lstrip(".") for own in group)
        if name in group and all(own in modules for own in paths):
            return paths
    return ()


def with_partners(data: AdapterData, modules: Mapping[str, nn.Module]) -> AdapterData:
    """The adapter with an update of zero where a group is adapted in part.

    Args:
        data: an adapter of one rank.
        modules: the modules of the model by path.
    """
    there = {(pair.path, pair.weight) for pair in data.pairs}
    pairs: list[PairData] = []
    for pair in data.pairs:
        pairs.append(pair)
        for path, weight, shape in _missing(pair, modules):
            if (path, weight) not in there:
                there.add((path, weight))
                pairs.append(_zero(pair, path, weight, shape))
    return replace(data, pairs=tuple(_in_order(pairs, modules)))


def _in_order(pairs: list[PairData], modules: Mapping[str, nn.Module]) -> list[PairData]:
    """Those of one module in the order of its parameters, by which PEFT names them."""
    first = {pair.path: i for i, pair in reversed([*enumerate(pairs)])}

    def position(pair: PairData) -> tuple[int, int]:
        names = list(modules[pair.path]._parameters) if pair.path in modules else []
        return first[pair.path], names.index(pair.weight) if pair.weight in names else 0

    return sorted(pairs, key=position)


def _missing(
    pair: PairData, modules: Mapping[str, nn.Module]
) -> Iterable[tuple[str, str, tuple[int, int]]]:
    """(path, parameter, (in, out)) of what goes with a pair."""
    module = modules.get(pair.path)
    if pair.form == "experts" and pair.A.dim() == 3 and module is not None:
        for name, fused in fused_weights(module).items():
            yield pair.path, name, (fused.n_in, fused.n_out)
    elif pair.form == "linear" and pair.weight == "weight":
        for path in partners(pair.path, modules):
            if isinstance(kind := find_kind(modules[path]), LinearKind):
                yield path, "weight", kind.features(modules[path])


def _zero(pair: PairData, path: str, weight: str, shape: tuple[int, int]) -> PairData:
    """An update of zero, as large as that of a pair."""
    (n_in, n_out), experts = shape, pair.A.shape[:-2]

    def zeros(like: Tensor, *size: int) -> Tensor:
        return torch.zeros(*experts, *size, dtype=like.dtype, device=like.device)

    A, B = zeros(pair.A, pair.rank, n_in), zeros(pair.B, n_out, pair.rank)
    return replace(pair, path=path, weight=weight, A=A, B=B, filled=True)
