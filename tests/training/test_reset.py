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


def tied(device):
    with torch.device(device):
        model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    inject(model, ["embed", "head"], r=2, seed=3)
    return model


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_layers_share_the_starting_values_of_inject(device):
    model = tied(device)
    if device == "meta":
        model.to_empty(device="cpu")
        model["head"].weight = model["embed"].weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    reset_lora_parameters(model)
    for name in ("lora_A", "lora_B"):
        assert model["embed"].get_parameter(name) is model["head"].get_parameter(name)
        assert torch.equal(
            model.get_parameter(f"embed.{name}"), tied("cpu").get_parameter(f"embed.{name}")
        )


def test_what_is_tied_and_trains_in_place_has_one_value_that_came():
    def build(device):
        with torch.device(device):
            model = nn.ModuleDict({"fc": nn.Linear(4, 4), "embed": nn.Embedding(9, 4)})
            model["head"] = nn.Linear(4, 9, bias=False)
        model["head"].weight = model["embed"].weight
        return model

    model, base = build("meta"), build("cpu")
    inject(model, "fc", r=2, train_also=["embed", "head"])
    model.to_empty(device="cpu")
    model["head"].weight = model["embed"].weight
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            model.get_parameter(name).copy_(parameter)
    reset_lora_parameters(model)
    with torch.no_grad():
        model["head"].weight.fill_(7)
    strip(model)
    assert model["head"].weight is model["embed"].weight
    assert torch.equal(model["head"].weight, base["head"].weight)


def test_former_values_that_were_known_stay_as_they_were():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = nn.Parameter(model["head"].weight.to("meta"))
    inject(model, "fc", r=2, train_also="head")
    bias, weight = model["head"].bias.detach().clone(), torch.eye(4)
    model["head"].weight = nn.Parameter(weight.clone())
    with torch.no_grad():
        model["head"].bias.add_(1)
    reset_lora_parameters(model)
    strip(model)
    assert torch.equal(model["head"].bias, bias)
    assert torch.equal(model["head"].weight, weight)


def test_what_was_taken_out_meanwhile_has_no_value_to_come():
    model = on_meta()
    use(model, "a")
    model.to_empty(device="cpu")
    for layer in (model.head, model.layers[0].q_proj):
        layer.bias = None
    model.layers[1].q_proj.lora_1_b_bias_kept = None
    reset_lora_parameters(model)
    assert model.head.bias is model.layers[0].q_proj.bias is None
