"""Blocks end whatever happened inside of them, in any order, and leave the model as it was."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers import Faults, Net, changed_parts, ids, randomize_adapters, snapshot, train_steps
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_inject import (
    LoRAInjectError,
    capacity,
    disabled,
    inject,
    merge,
    merged,
    per_row,
    strip,
    unmerge,
    use,
)

pytestmark = pytest.mark.cpu("it is about states, not values")


def two(**options):
    model = Net().eval()
    inject(model, ["q_proj", "v_proj"], r=2, adapter="fr", **options)
    inject(model, ["q_proj", "o_proj"], r=2, adapter="de")
    randomize_adapters(model)
    return model


def test_a_disabled_block_keeps_the_order_of_parameters():
    model = two(bias="all", train_also="head")
    use(model, "fr")
    train_steps(model, ids())
    before = snapshot(model)
    with disabled(model):
        pass
    assert changed_parts(before, snapshot(model)) == []


def test_a_disabled_block_whose_end_fails_ends():
    model, x = two(bias="all"), ids()
    before, y = snapshot(model), model(x)
    with pytest.raises(MemoryError), Faults(10_000) as faults, disabled(model):
        faults.left, faults.error = 3, MemoryError
    assert faults.raised
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(x), y)


def test_what_happened_to_a_layer_inside_does_not_hold_up_the_end():
    """The class that something else has put on it stays, and all else is as outside."""
    model = two()
    layer, x = model.layers[0].q_proj, ids()
    y, on = model(x), type(layer)
    block = disabled(model)
    block.__enter__()
    layer.__class__ = type("Sharded", (type(layer),), {})
    block.__exit__(None, None, None)
    assert type(layer).__name__ == "Sharded"
    layer.__class__ = on  # undone
    assert torch.equal(model(x), y)


def test_a_layer_that_has_left_the_model_inside_leaves_the_block():
    model = two()
    before = type(model.layers[0].q_proj)
    with disabled(model):
        layer, model.layers[0].q_proj = model.layers[0].q_proj, nn.Linear(8, 8)
    assert type(layer) is before


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_merged_around_merged(first):
    model, x = two(), ids()
    before, y = snapshot(model), model(x)
    outer, inner = merged(model, "fr"), merged(model, "de")
    outer.__enter__()
    inner.__enter__()
    torch.testing.assert_close(model(x), y)
    ends = [inner, outer] if first == "inner" else [outer, inner]
    ends[0].__exit__(None, None, None)
    torch.testing.assert_close(model(x), y)
    ends[1].__exit__(None, None, None)
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(x), y)


def test_a_merged_block_inside_of_what_was_not_kept_is_refused():
    model = two()
    merge(model, "fr", keep=False)
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match="keep=False"), merged(model, "de"):
        pass
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_a_merge_that_fails_while_it_copies_has_merged_nothing(keep, monkeypatch):
    model = two()
    before, calls = snapshot(model), []
    cpu = torch.Tensor.cpu

    def failing(tensor):
        calls.append(tensor)
        if len(calls) == 3:
            raise MemoryError("no")
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", failing)
    if keep == "cpu":
        with pytest.raises(MemoryError):
            merge(model, keep=keep)
        monkeypatch.undo()
        assert changed_parts(before, snapshot(model)) == []
    monkeypatch.undo()
    merge(model, keep=keep)
    unmerge(model)
    assert changed_parts(before, snapshot(model)) == []


BLOCKS = {
    "off": lambda m: disabled(m),
    "part off": lambda m: disabled(m.layers[0]),
    "rows": lambda m: per_row(m, ["fr", "de"]),
    "part's rows": lambda m: per_row(m.layers[0], [None, "de"]),
    "merged": lambda m: merged(m, "fr"),
}


@pytest.mark.parametrize("names", list(itertools.combinations(BLOCKS, 3)), ids="-".join)
def test_three_blocks_end_in_any_order(names):
    x = ids()
    for order in itertools.permutations(range(3)):
        model = two()
        before, y = snapshot(model), model(x)
        opened = []
        for name in names:
            block = BLOCKS[name](model)
            try:
                block.__enter__()
            except LoRAInjectError:  # disabled beats rows, and merging needs no block
                continue
            opened.append(block)
        for at in order:
            if at < len(opened):
                opened[at].__exit__(None, None, None)
        assert changed_parts(before, snapshot(model)) == []
        assert torch.equal(model(x), y)


def test_a_merged_block_that_ends_inside_of_a_disabled_one():
    model, x = two(), ids()
    use(model)
    base = model(x)
    use(model, "fr", "de")
    before, y = snapshot(model), model(x)
    merge(model, "fr")
    folded = snapshot(model)
    inner, off = merged(model, "de"), disabled(model)
    inner.__enter__()
    off.__enter__()
    assert torch.equal(model(x), base)
    inner.__exit__(None, None, None)
    assert torch.equal(model(x), base)
    off.__exit__(None, None, None)
    assert changed_parts(folded, snapshot(model)) == []
    unmerge(model)
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(x), y)


def test_nested_rows_closed_out_of_order():
    model, x = two(), ids()
    y = model(x)
    outer, inner = per_row(model, ["fr", "fr"]), per_row(model, ["de", None])
    with per_row(model, ["de", None]):
        expected = model(x)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert torch.equal(model(x), expected)
    inner.__exit__(None, None, None)
    assert torch.equal(model(x), y)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda m: torch.save(m, io.BytesIO()),
    "AveragedModel": AveragedModel,
    "a part": lambda m: copy.deepcopy(m.layers[0]),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("block", ["disabled", "per_row"])
def test_copies_inside_a_block_are_refused_with_the_remedy(make, block):
    model = two()
    enter = disabled(model) if block == "disabled" else per_row(model, ["fr", None])
    before = snapshot(model)
    with enter, pytest.raises(LoRAInjectError, match=f"{block} block.*Leave the with block first"):
        make(model)
    assert changed_parts(before, snapshot(model)) == []
    make(model)
    strip(model)


def test_capacity_inside_a_block_says_so_itself():
    model = two()
    with disabled(model), pytest.raises(LoRAInjectError, match="disabled block, and its capacity"):
        capacity(model, ids())
    assert capacity(model, ids()).adapters
