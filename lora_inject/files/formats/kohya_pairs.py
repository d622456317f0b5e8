"""One layer of kohya's files: its tensors as a pair, and back."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.files.formats import lycoris
from lora_inject.files.formats.data import PairData
from lora_inject.files.formats.image_parts import DOWN, LENGTHS, MID, SCALE, UP
from lora_inject.kinds.base import Form


def tensors_of(pair: PairData) -> dict[str, Tensor]:
    """The tensors of a layer by what stands behind its name.

    Raises:
        FormatError: the format has no word for its variant.
    """
    if lycoris.is_whole(pair):  # which is added as it is, whatever alpha
        B = (pair.B.double() * pair.scaling).to(pair.B.dtype) if pair.scaling != 1 else pair.B
        pair = replace(pair, B=B, alpha=float(pair.rank), rule="lora")
    own = {"alpha": torch.tensor(pair.scaling * pair.rank)}
    own |= lycoris.tensors_of(pair) if lycoris.algorithm(pair) else {DOWN: pair.A, UP: pair.B}
    if pair.variant in ("dora", "dora_loha", "dora_lokr"):
        return {**own, SCALE: lycoris.scale_of(pair)}
    if pair.variant == "tucker":
        return {**own, MID: pair.others["mid"]}
    if pair.variant not in ("lora", "loha", "lokr"):
        raise FormatError(
            f"{pair.name} is a {pair.variant}, which kohya's format is not written with.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
    return own


def pair_of(path: str, own: Mapping[str, Tensor], alpha: float | None, where: Path) -> PairData:
    """The pair that the tensors of a layer are.

    Args:
        path: the layer.
        own: its tensors by what stands behind its name.
        alpha: where the file does not say it; None takes the rank.
        where: the file, for errors.

    Raises:
        FormatError: they are no adapter of a kind that is supported.
    """
    rest = dict(own)
    value, scale = rest.pop("alpha", None), rest.pop(SCALE, None)
    if LENGTHS in rest:  # of rows
        lengths = rest.pop(LENGTHS)
        scale = lengths.reshape(-1, *(1,) * (rest[UP].dim() - 1 if UP in rest else 1))
    if value is not None and value.numel() != 1:
        raise FormatError(f"{path}: alpha must be one number, not {tuple(value.shape)}.")
    if value is not None and value.item() != 0:  # the scripts read 0 as none
        alpha = value.item()
    if rest and rest.keys() <= {*lycoris.KEYS}:
        pair = lycoris.pair_of(path, rest, alpha, None, where)
        if lycoris.is_whole(pair):  # alpha is its rank then, and changes nothing
            r = int(alpha) if alpha and 1 <= alpha < 2**31 and alpha == int(alpha) else 1
            pair = replace(pair, r=r, alpha=float(r))
    elif {DOWN, UP} <= rest.keys() <= {DOWN, UP, MID}:
        A, B, mid = rest[DOWN], rest[UP], rest.get(MID)
        form: Form = "conv" if A.dim() > 2 else "linear"
        more = {} if mid is None else {"mid": mid}
        pair = PairData(path, A, B, alpha, form, variant="tucker" if more else "lora", others=more)
    else:
        raise FormatError(f"{where}: {path} has only {sorted(rest)} of what makes an adapter.")
    if scale is not None:
        if pair.variant == "tucker":
            raise FormatError(
                f"{where}: {path} is a DoRA of a tucker, which is not supported.",
                remedy="Merge it where it was made.",
            )
        pair = lycoris.with_magnitude(pair, scale, where)
    return pair if pair.alpha is not None else replace(pair, alpha=float(pair.rank))
