"""Several names of one place in a file: their values have to agree."""

from typing import Any

import torch
from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData

Given = dict[Any, tuple[str, tuple[Tensor, ...]]]  # by place: the first name, and its values


def is_repeated(given: Given, place: Any, name: str, *values: Tensor) -> bool:
    """Whether a file has given a place its values already, under another name.

    Args:
        given: what it has given so far; a new place is noted there.
        place: anything that tells it from other places.
        name: what the file calls it now.
        values: its values.

    Raises:
        FormatError: it had other values.
    """
    if place not in given:
        given[place] = name, values
        return False
    first, known = given[place]
    same = len(known) == len(values) and all(map(_is_same, known, values))
    if not same:
        raise FormatError(
            f"{first} and {name} are one place, and their values differ.",
            remedy="Remove the one that is not meant from the file.",
        )
    return True


def is_repeated_pair(given: Given, place: Any, name: str, pair: PairData) -> bool:
    """``is_repeated`` of its tensors and what they are scaled with."""
    scaling = torch.tensor(float("inf") if pair.alpha is None else pair.scaling)
    return is_repeated(given, place, name, pair.A, pair.B, scaling, *pair.others.values())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)
