"""Starting values anew, and former values that have come into being since."""

import pytest
import torch
from helpers import Net, ids, train_steps
from torch import nn

from lora_inject import inject, reset_lora_parameters, strip, use

pytestmark = pytest.mark.cpu("it is about where values come from")


def on_meta():
    with torch.device("meta"):
        model = Net()
    for name in ("a", "b"):
        inject(model, "q_proj", r=2, adapter=name, bias="all", train_also="head")
        use(model)
    return model


def copied(model, base):
    """By hand, so that nothing of torch tells that values come."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            model.get_parameter(name).copy_(parameter)


def replaced(model, base):
    for name, parameter in base.named_parameters():
        put(model, name, parameter.detach().clone())
    for name, parameter in [*model.named_parameters()]:
        if parameter.is_meta:
            put(model, name, torch.empty(parameter.shape))


def put(model, name, value):
    path, _, last = name.rpartition(".")
    trains = model.get_parameter(name).requires_grad
    setattr(model.get_submodule(path), last, nn.Parameter(value, requires_grad=trains))


@pytest.mark.parametrize("bring", [copied, replaced])
def test_what_trains_in_place_begins_with_weights_that_came_by_hand(bring):
    model, base = on_meta(), Net()
    bring(model, base)
    reset_lora_parameters(model)
    for name in ("a", "b"):
        use(model, name)
        for key, own in base.named_parameters():
            assert torch.equal(model.get_parameter(key), own), key
        train_steps(model, ids())
        assert not torch.equal(model.head.weight, base.head.weight)
    strip(model)
    for key, own in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], own), key
