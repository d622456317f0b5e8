"""A pair of a file as the weight that it is for stands in a module."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from lora_inject.core.adapter import Adapter
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData
from lora_inject.files.formats.merged_linear import Span, enabled_spans, split
from lora_inject.kinds import find_kind
from lora_inject.kinds.parameter import layout_of
from lora_inject.variants import OTHER


def in_parts(pair: PairData, module: nn.Module, adapters: Iterable[Adapter]) -> list[PairData]:
    """The pair, or those of the parts that it is for, by the names that the model has for them.

    Args:
        pair: a pair of the file.
        module: the module that it is for.
        adapters: what the module has of the adapter that is to be filled.

    Raises:
        FormatError: it is for parts, and nothing tells for which.
    """
    own = [Span(s.part, s.start, s.n_out) for a in adapters for s in a.specs if s.part]
    if pair.part:
        there = {(span.start, span.size): span.name for span in own}
        return [replace(pair, part=there.get((pair.span[0], pair.B.shape[0]), pair.part))]
    kind = find_kind(module)
    if pair.form != "linear" or kind is None or not kind.has_parts:
        return [pair]
    total = cast(Any, kind).features(module)[1]
    rows, n = pair.B.shape[0], pair.A.shape[0] // pair.B.shape[1]
    if n == len(own) and rows == sum(span.size for span in own):
        return split(pair, own, total)
    if pair.weight:
        return [pair]
    if rows == total:
        return split(pair, enabled_spans([True] * n, total), total)
    raise FormatError(
        f"the file adapts {n} parts of this fused projection (loralib's MergedLinear), and does "
        "not say which.",
        path=pair.path,
        remedy='Inject first, as parts={"c_attn": ("q", None, "v")} says it, and load into that.',
    )


def turned(pair: PairData, module: nn.Module) -> PairData:
    """The pair as the weight that it is for stands in the module."""
    if pair.alpha is not None and pair.alpha < 0:
        pair = replace(pair, alpha=-pair.alpha, B=-pair.B)
    pair = _of_dimensions(pair, module)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        return _of_groups(pair, module.groups, module.in_channels)
    W = module._parameters.get(pair.weight)
    own = layout_of(module, W) if W is not None and pair.form == "experts" else None
    if own is not None and pair.layout and own != pair.layout:
        A, B = pair.B.transpose(-2, -1), pair.A.transpose(-2, -1)
        return replace(pair, A=A, B=B, layout=own, fixed=OTHER[pair.fixed])
    return pair


def _of_dimensions(pair: PairData, module: nn.Module) -> PairData:
    """A pair of a Linear layer for a convolution, or of a kernel of 1 for a Linear layer.

    UNets have one or the other in the same place, and tools take the files of both.
    """
    if pair.form not in ("linear", "conv") or pair.has_own_shapes or pair.variant == "tucker":
        return pair
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and pair.A.dim() == 2:
        kernel, channels = module.kernel_size, module.in_channels // module.groups
        if pair.A.shape[1] != channels * math.prod(kernel):
            return pair
        A = pair.A.reshape(-1, channels, *kernel)
        return replace(pair, A=A, B=pair.B.reshape(*pair.B.shape, *(1,) * len(kernel)), form="conv")
    if isinstance(module, nn.Linear) and pair.form == "conv" and math.prod(pair.A.shape[2:]) == 1:
        return replace(pair, A=pair.A.flatten(1), B=pair.B.flatten(1), form="linear")
    return pair


def _of_groups(pair: PairData, groups: int, channels: int) -> PairData:
    """A pair of a grouped convolution: A may be for all channels, as PEFT has it, or one for all.

    Raises:
        FormatError: A mixes channels of several groups, which no grouped weight can do.
    """
    if pair.has_own_shapes or pair.A.dim() < 3:
        return pair
    if pair.A.shape[:2] == (pair.rank, channels // groups):  # as LyCORIS has it
        return replace(pair, A=pair.A.repeat(groups, *(1,) * (pair.A.dim() - 1)))
    if pair.A.shape[1] != channels or pair.A.shape[0] % groups:
        return pair
    blocks = pair.A.reshape(groups, -1, groups, channels // groups, *pair.A.shape[2:])
    own = torch.stack([blocks[g, :, g] for g in range(groups)])
    if own.count_nonzero() != blocks.count_nonzero():
        raise FormatError(
            "its adapter mixes channels of several groups, which a grouped convolution cannot.",
            path=pair.path,
        )
    return replace(pair, A=own.flatten(0, 1))
