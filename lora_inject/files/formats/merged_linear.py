"""Fused projections as loralib's ``MergedLinear`` and the first PEFT have them: n of N equal parts.

A holds the A of the n parts, one below the other, (n r, in), and B their B, (n out/N, r). Which of
the N parts they are for is said by the code (loralib) or by ``enable_lora`` in the config (PEFT).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData


class Span(NamedTuple):
    """A part of a fused projection: its name, its first output feature and how many it has."""

    name: str
    start: int
    size: int


def is_merged(A: Tensor, B: Tensor) -> bool:
    """Whether A has the ranks of several parts and B those of one."""
    return A.dim() == B.dim() == 2 and 0 < B.shape[1] < A.shape[0] and not A.shape[0] % B.shape[1]


def enabled_spans(enabled: Sequence[bool], features: int) -> list[Span]:
    """The spans of the enabled ones of equal parts, which together have so many features."""
    size = features // max(1, sum(enabled))
    return [Span(f"part{i}", i * size, size) for i, on in enumerate(enabled) if on]


def split(pair: PairData, spans: Sequence[Span], total: int) -> list[PairData]:
    """The pairs of the parts.

    Args:
        pair: of all of them together.
        spans: the parts, in the order in which they stand in it.
        total: the output features of the whole layer.

    Raises:
        FormatError: it is not of so many equal parts.
    """
    (r_all, _), (features, r), n = pair.A.shape, pair.B.shape, len(spans)
    sizes = {span.size for span in spans}
    if r_all != n * r or sizes != {features // n} or features % n:
        raise FormatError(
            f"its A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)} are not of {n} equal parts.",
            path=pair.path,
        )
    return [
        replace(pair, A=A, B=B, weight="weight", part=span.name, span=(span.start, total))
        for span, A, B in zip(spans, pair.A.chunk(n), pair.B.chunk(n), strict=True)
    ]


def merged(parts: Sequence[PairData]) -> tuple[Tensor, Tensor]:
    """A and B of the parts of one layer together.

    Raises:
        FormatError: they are not some of several equal parts.
    """
    parts = sorted(parts, key=lambda pair: pair.span)
    sizes = {(pair.B.shape[0], pair.rank, pair.scaling) for pair in parts if pair.part}
    size, total = parts[0].B.shape[0], parts[0].span[1]
    if len(sizes) > 1 or total % size or any(pair.span[0] % size for pair in parts):
        raise FormatError(
            "it is adapted in parts of several sizes, and loralib's MergedLinear has equal ones.",
            path=parts[0].path,
            remedy='Save it as "peft".',
        )
    return torch.cat([pair.A for pair in parts]), torch.cat([pair.B for pair in parts])
