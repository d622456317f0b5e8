"""Pairs as other libraries lay them out: no parts, dense groups, whole attention, one rank for all.

Every change here leaves the update ``scaling * B A`` of each weight what it was.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.kinds.parameter import layout_of


def as_portable(data: AdapterData) -> AdapterData:
    """The same updates with one rank and a scaling of 1 for all, for readers of no patterns.

    Ranks are padded with zeros, and scalings are folded into B. No factor is fixed: those of other
    ranks are not what was.
    """
    data.require_no_rows("a file for readers of no patterns")
    pairs = whole_layers(data.pairs)
    r = max(config_rank(pair) for pair in pairs)
    plain = tuple(replace(_padded(pair, r), fixed="") for pair in pairs)
    return replace(data, pairs=plain, dtype="")


def _padded(pair: PairData, r: int) -> PairData:
    pair.require_plain("one rank for all")
    groups = config_rank(pair) // pair.rank
    if r % groups:
        raise FormatError(f"{pair.name}: rank {r} does not divide into its {groups} groups.")
    extra, B = r // groups - pair.rank, pair.B
    if pair.scaling != 1.0:  # in float32, since 16 bits might not hold the product
        dtype = torch.promote_types(B.dtype, torch.float32)
        B = (B.double() * pair.scaling).to(dtype)
        if not B.isfinite().all():
            raise FormatError(f"{pair.name}: B times its scaling of {pair.scaling:g} is too large.")
    if pair.form == "experts":
        A, B = F.pad(pair.A, (0, 0, 0, extra)), F.pad(B, (0, extra))
    else:
        ends = [0, 0] * (B.dim() - 2)
        A = pair.A.reshape(groups, -1, *pair.A.shape[1:])
        A = F.pad(A, (*[0, 0] * (A.dim() - 2), 0, extra)).flatten(0, 1)
        B = F.pad(B, (*ends, 0, extra))
    # A start that is subtracted is not in the second half any more, and is not told.
    return replace(pair, A=A, B=B, alpha=float(r // groups), rule="lora", start="")


def whole_layers(pairs: Iterable[PairData]) -> list[PairData]:
    """Parts of one layer as one pair: their ranks side by side, each with its rows of B."""
    return [_joined(own) if own[0].part else own[0] for own in by_layer(pairs)]


def by_layer(pairs: Iterable[PairData]) -> list[list[PairData]]:
    """The pairs of each weight: one, or those of its parts.

    Raises:
        FormatError: a weight is adapted both ways.
    """
    groups: dict[tuple[str, str], list[PairData]] = {}
    for pair in pairs:
        groups.setdefault((pair.path, pair.weight), []).append(pair)
    for own in groups.values():
        if len(own) > 1 and not all(pair.part for pair in own):
            raise FormatError(
                f"{own[0].name} is adapted as a whole and in parts, which other formats cannot say."
            )
    return list(groups.values())


def _joined(parts: list[PairData]) -> PairData:
    scaling = parts[0].scaling
    blocks = []
    for pair in parts:
        pair.require_plain(
            "a layer in parts",
            "Give portable=True, r=16, error=0.1 for a plain LoRA near to it; or "
            "torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
        start, total = pair.span
        # Parts of one adapter have one scaling.
        blocks.append(F.pad(pair.B, (0, 0, start, total - start - pair.B.shape[0])))
    A, B = torch.cat([pair.A for pair in parts]), torch.cat(blocks, 1)
    alpha = scaling * B.shape[1]
    return replace(parts[0], A=A, B=B, alpha=alpha, rule="lora", part="", span=(0, 0))


def divided(pair: PairData, parts: Any, path: Path) -> Iterable[PairData]:
    """The parts of a pair that ``whole_layers`` has put together."""
    try:
        rows = [(str(p), int(s), int(n), int(r), float(a)) for p, s, n, r, a in parts["parts"]]
        total = int(parts["total"])
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise FormatError(f"{path}: the parts of {pair.name} cannot be read.") from error
    inside = all(min(s, n - 1, r - 1) >= 0 and s + n <= total for _, s, n, r, _ in rows)
    if not rows or not inside or (total, sum(r for _, _, _, r, _ in rows)) != pair.B.shape:
        raise FormatError(f"{path}: the parts of {pair.name} are not those of its B.")
    first = 0
    for part, start, size, r, alpha in rows:
        A, B = pair.A[first : first + r], pair.B[start : start + size, first : first + r]
        span = (start, total)
        yield replace(pair, A=A, B=B, alpha=alpha, rule="lora", part=part, span=span)
        first += r


def with_whole_attention(pairs: list[PairData]) -> list[PairData]:
    """PEFT adapts nn.MultiheadAttention with its out_proj, at one rank and alpha, or not at all.

    What is missing is zero, and the smaller rank is padded.
    """
    heads = {p.path: p for p in pairs if p.weight == "in_proj_weight"}
    outs = {p.path: p for p in pairs if p.in_attention}
    result = [p for p in pairs if p.path not in heads and p.path not in outs]
    for path in dict.fromkeys([*heads, *(p.removesuffix(".out_proj") for p in outs)]):
        head, out = heads.get(path), outs.get(f"{path}.out_proj")
        if head and out and (head.rank, head.alpha) != (out.rank, out.alpha):
            r = max(head.rank, out.rank)
            head, out = _padded(head, r), _padded(out, r)
        like = head or out
        assert like is not None
        A, width = torch.zeros_like(like.A), like.A.shape[1]
        if head is None:
            B = like.B.new_zeros(3 * width, like.rank)
            head = replace(like, path=path, A=A, B=B, weight="in_proj_weight", in_attention=False)
        if out is None:
            B, name = like.B.new_zeros(width, like.rank), f"{path}.out_proj"
            out = replace(like, path=name, A=A, B=B, weight="weight", in_attention=True)
        result += [head, out]
    return result


def over_all_channels(pair: PairData) -> Tensor:
    """A of a grouped convolution as PEFT has it: for all channels, zero outside of its group."""
    groups = config_rank(pair) // pair.rank
    if groups == 1:
        return pair.A
    A = pair.A.reshape(groups, pair.rank, *pair.A.shape[1:])
    whole = A.new_zeros(groups, pair.rank, groups, *A.shape[2:])
    for g in range(groups):
        whole[g, :, g] = A[g]
    return whole.reshape(groups * pair.rank, -1, *A.shape[3:])


def config_rank(pair: PairData) -> int:
    """What PEFT calls the rank: of a grouped convolution that of all groups together."""
    return pair.A.shape[0] if pair.form == "conv" else pair.rank


def told_layout(module: nn.Module, parameter: Tensor) -> str:
    """How PEFT reads a fused parameter: as its module says, else (E, out, in)."""
    return layout_of(module, parameter) or "out_in"
