"""What belongs to a tensor and not to a module, marked on the tensor.

``requires_grad`` does: a parameter that is tied between two parts of a model which were adapted on
their own has one flag. The mark keeps the flag from before and the places that calls have seen, so
that each part knows of the other. And a parameter that was moved to another place since, as pruning
and parametrizations do, gets its flag back by it.

Torch keeps the mark in ``.half()`` and drops it in deep copies, ``load_state_dict(assign=True)``
and ``.to("meta")``; then the flags that the states of modules keep have to do.
"""

import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from lora_inject.changes.edits import MISSING, Edit, put_attribute
from lora_inject.own import Place

_MARK = "_lora_inject_mark"
_References = tuple[tuple[weakref.ref[nn.Module], str], ...]


class Mark:
    """On a parameter that a call has frozen or let train, or that adapters share between places.

    Attributes:
        flag: its ``requires_grad`` from before; None for an adapter's.
        places: where it stands, in whatever part of a model, by weak reference.
    """

    __slots__ = ("flag", "places")

    def __init__(self, flag: bool | None, places: _References) -> None:
        self.flag, self.places = flag, places

    def is_at(self, module: nn.Module, name: str) -> bool:
        """Whether that is the only place."""
        return len(self.places) == 1 and self.places[0][0]() is module and self.places[0][1] == name

    def __reduce__(self) -> Any:
        # Something that any reader of a pickle knows, weights_only ones too: it stays behind.
        return OrderedDict, ()


def mark_of(tensor: Tensor) -> Mark | None:
    """The mark on a tensor, or None."""
    mark = tensor.__dict__.get(_MARK)
    return mark if isinstance(mark, Mark) else None


def places_of(mark: Mark | None) -> list[Place]:
    """The places that a mark knows of and that are alive."""
    found = ((ref(), name) for ref, name in (mark.places if mark else ()))
    return [(module, name) for module, name in found if module is not None]


def mark_edit(tensor: Tensor, mark: Mark | None) -> Edit:
    """Mark a tensor, or take its mark off."""
    old = tensor.__dict__.get(_MARK, MISSING)
    return (put_attribute, tensor, _MARK, old, MISSING if mark is None else mark)


def marking_edits(tensor: Tensor, flag: bool | None, places: list[Place]) -> list[Edit]:
    """Mark a tensor with these places, where it has not that very mark."""
    mark = mark_of(tensor)
    if mark is not None and places_of(mark) == places and mark.flag is flag:
        return []
    refs = tuple([(weakref.ref(module), name) for module, name in places])
    return [mark_edit(tensor, Mark(flag, refs))]


def unmarking_edits(tensor: Tensor) -> list[Edit]:
    """Take the mark off a tensor that has one, or what a pickle has made of one."""
    return [mark_edit(tensor, None)] if _MARK in tensor.__dict__ else []
