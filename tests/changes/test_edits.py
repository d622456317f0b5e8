"""Edits: all of them or none, in whatever form they come and however often that is interrupted."""

import pytest
import torch
from torch import nn

from lora_inject.changes.edits import (
    _TRIES,
    attribute_edit,
    items_edits,
    put_members,
    put_parameter,
    run,
    surely,
    undo,
    value_edit,
)

pytestmark = pytest.mark.cpu("it is about steps, not values")


def test_what_is_raised_takes_back_edits_of_every_sort_and_goes_on():
    module, names, items = nn.Linear(2, 2), {"a", "b"}, {"x": 1, "y": 2}
    weight = module.weight.detach().clone()
    edits = (
        attribute_edit(module, "note", 1),
        value_edit(module.weight, torch.zeros(2, 2)),
        (put_members, names, None, frozenset(names), frozenset("c")),
        *items_edits(items, [("y", 3)]),
    )
    run(edits)
    assert (module.note, names, items) == (1, {"c"}, {"y": 3})
    assert torch.equal(module.weight, torch.zeros(2, 2))
    undo(edits)
    with pytest.raises(ZeroDivisionError):
        run(edits, lambda: 1 / 0)
    assert (vars(module).get("note"), names) == (None, {"a", "b"})
    assert list(items.items()) == [("x", 1), ("y", 2)]
    assert torch.equal(module.weight, weight)


def test_a_dict_that_has_the_items_is_left_alone():
    items = {"x": 1, "y": 2}
    assert items_edits(items, [("x", 1), ("y", 2)]) == []
    assert items_edits(items, [("y", 2), ("x", 1)]) != []


@pytest.mark.parametrize("interrupts", [0, 1, _TRIES])
def test_undo_goes_on_however_often_it_is_interrupted(interrupts):
    left, done = [KeyboardInterrupt] * interrupts, []

    def put(target, key, value):
        if left:
            raise left.pop()
        done.append(value)

    undo([(put, None, None, "first", None), (put, None, None, "second", None)])
    assert done == ["second", "first"]


def test_undo_gives_up_on_what_never_succeeds():
    tries = []

    def put(target, key, value):
        tries.append(value)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        undo([(put, None, None, "old", None)])
    assert len(tries) == _TRIES + 1


def test_a_class_that_keeps_lists_of_its_parameters_hears_of_another():
    lstm, plain = nn.LSTM(2, 2), nn.Linear(2, 2)
    new = nn.Parameter(torch.zeros_like(lstm.weight_ih_l0))
    put_parameter(lstm, "weight_ih_l0", new)
    assert lstm._flat_weights[0] is lstm.weight_ih_l0 is new
    local = torch.zeros(2, 2)  # what tools put there need be no Parameter
    put_parameter(plain, "weight", local)
    assert plain.weight is local


def test_what_has_to_be_done_is_done_once_and_tells_what_was_raised_first():
    done, left = [], [KeyError, ZeroDivisionError]
    surely(lambda: done.append(1))
    assert done == [1]

    def failing():
        if left:
            raise left.pop()
        done.append(2)

    with pytest.raises(ZeroDivisionError):
        surely(failing)
    assert done == [1, 2]
