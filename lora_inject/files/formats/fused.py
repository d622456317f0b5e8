"""Between a tool's module and ours, where several of ours are fused in theirs.

Their B has the rows of ours one below the other, over ranks that are one for all or side by side.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData
from lora_inject.files.formats.image_names import Slot


def divided(
    pair: PairData, slots: Sequence[Slot], sizes: Sequence[int], ranks: Sequence[int] = ()
) -> list[PairData]:
    """The pairs of our modules, without those that are not adapted.

    Args:
        pair: that of the tool's module.
        slots: our modules.
        sizes: how many outputs each of them has.
        ranks: how many of the ranks, which stand side by side, are each one's, where the file says
            so. Else a rank that is zero in the rows of one, and not in all others, is none of its.

    Raises:
        FormatError: it cannot be divided.
    """
    if len(slots) == 1 and not slots[0].exchanged:
        return [replace(pair, path=slots[0].path)]
    if pair.variant not in ("lora", "dora") or pair.B.dim() > 2 or sum(sizes) != len(pair.B):
        raise FormatError(
            f"{pair.name} is a {pair.variant} with {pair.B.shape[0]} outputs, and stands for "
            f"{', '.join(slot.path for slot in slots)} here, with {' + '.join(map(str, sizes))}: "
            "it cannot be divided."
        )
    found, first = [], 0
    for slot, size, kept in zip(slots, sizes, _kept(pair, sizes, ranks), strict=True):
        rows = slice(first, first + size)
        first += size
        if kept.any():
            A, B = pair.A[kept].contiguous(), _turned(pair.B[rows][:, kept], slot)
            others = {role: _turned(lengths[rows], slot) for role, lengths in pair.others.items()}
            alpha = None if pair.alpha is None else pair.scaling * A.shape[0]
            found.append(replace(pair, path=slot.path, A=A, B=B, alpha=alpha, others=others))
    return found


def _kept(pair: PairData, sizes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Which ranks are each module's, as a mask."""
    used = torch.stack([block.any(0) for block in torch.split(pair.B, [*sizes])])
    if len(ranks) == len(sizes) and sum(ranks) == pair.rank:
        whose = torch.arange(len(ranks)).repeat_interleave(torch.tensor([*ranks]))
        said = torch.stack([whose == i for i in range(len(ranks))])
        if not (used & ~said).any():  # else another tool has made other factors of it since
            return [*said]
    mine = used | ~used.any(0)
    # Of a decomposed one the lengths say something without any rank too.
    return [row if row.any() or pair.variant == "lora" else ~row for row in mine]


def _turned(rows: Tensor, slot: Slot) -> Tensor:
    """Rows as they stand in the other model."""
    return (torch.cat(rows.chunk(2)[::-1]) if slot.exchanged else rows).contiguous()


def joined(
    pairs: Mapping[str, PairData], slots: Sequence[Slot], sizes: Sequence[int]
) -> PairData | None:
    """Our modules as the one of the tool; None where it cannot be said of that.

    What is not adapted of it has zeros. That needs its size, and of a decomposed one its weight.

    Args:
        pairs: ours by path, some or all of those of the slots.
        slots: our modules.
        sizes: how many outputs each of them has, 0 where that is not known.
    """
    own = [pairs.get(slot.path) for slot in slots]
    there = [pair for pair in own if pair is not None]
    variants = {pair.variant for pair in there}
    plain = all(pair.form == "linear" and pair.weight == "weight" for pair in there)
    if len(slots) == 1 and not slots[0].exchanged:
        return there[0]
    if not plain or variants - {"lora", "dora"} or len(variants) > 1:
        return None
    if None in own and (variants == {"dora"} or not all(sizes)):
        return None
    there = _with_one_scaling(there)
    one = {pair.path: pair for pair in there}
    own = [one.get(slot.path) for slot in slots]
    rows = [size if p is None else p.B.shape[0] for p, size in zip(own, sizes, strict=True)]
    r, at, first = sum(pair.rank for pair in there), 0, 0
    dtype = functools.reduce(torch.promote_types, (pair.B.dtype for pair in there))
    B = there[0].B.new_zeros(sum(rows), r, dtype=dtype)
    for pair, slot, size in zip(own, slots, rows, strict=True):
        if pair is not None:
            B[first : first + size, at : at + pair.rank] = _turned(pair.B, slot)
            at += pair.rank
        first += size
    others = {}
    if variants == {"dora"}:
        others["magnitude"] = torch.cat(
            [_turned(p.others["magnitude"], s) for p, s in zip(there, slots, strict=True)]
        )
    A, alpha = torch.cat([pair.A for pair in there]), there[0].scaling * r
    return replace(there[0], A=A, B=B, alpha=alpha, rule="lora", others=others)


def _with_one_scaling(pairs: list[PairData]) -> list[PairData]:
    """The same updates with one scaling for all: their own, or else 1."""
    if len({pair.scaling for pair in pairs}) == 1:
        return pairs
    folded = []
    for pair in pairs:
        dtype = torch.promote_types(pair.B.dtype, torch.float32)
        B = (pair.B.double() * pair.scaling).to(dtype)
        folded.append(replace(pair, B=B, alpha=float(pair.rank), rule="lora"))
    return folded
