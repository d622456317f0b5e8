"""disabled: the base model for a while."""

import copy

import pytest
import torch
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot, train_steps

from lora_inject import disabled, inject

pytestmark = pytest.mark.usefixtures("device")


def test_disabled_shows_the_base_model_with_its_biases_and_head():
    model, x = Net(), ids()
    base = copy.deepcopy(model).requires_grad_(False)
    inject(model, ["q_proj", "embed"], r=2, bias="all", train_also="head")
    train_steps(model, x)
    before, trained = snapshot(model), model(x)
    with disabled(model):
        assert torch.equal(model(x), base(x))
        with disabled(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(x), trained)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert changed_parts(before, snapshot(model)) == []


def test_a_graph_stays_valid_across_a_disabled_block():
    gradients = []
    for block in (False, True):
        torch.manual_seed(0)
        model, x = Net(), ids()
        inject(model, "q_proj", r=2, bias="all", train_also="head", seed=0)
        randomize_adapters(model)
        output = model(x)
        if block:  # as a reference model between forward and backward
            with disabled(model), torch.no_grad():
                model(x)
        output.pow(2).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
