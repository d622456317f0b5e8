"""Defects that were reproduced in other libraries, and that no other test here is named for."""

import re
from pathlib import Path

import pytest
import torch
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot
from torch import nn

from lora_inject import (
    NoMatchError,
    disabled,
    inject,
    lora_parameters,
    merge,
    strip,
    unmerge,
)

pytestmark = pytest.mark.usefixtures("device")


def test_many_forwards_of_attention_move_no_bit_of_a_16_bit_base():
    """PEFT merges and unmerges at each one: after 200, a third of in_proj has changed."""
    attention = nn.MultiheadAttention(16, 2, dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in attention.named_parameters()}
    inject(attention, nn.MultiheadAttention, r=4)
    randomize_adapters(attention)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    for _ in range(200):
        attention(x, x, x)[0].sum().backward()
    assert all(torch.equal(attention.get_parameter(name), p) for name, p in before.items())


def test_train_and_eval_return_the_model():
    """Those of loralib return None, and ``model.train()(x)`` fails."""
    model = Net()
    inject(model, "q_proj", r=2)
    assert model.train() is model
    assert model.layers[0].q_proj.train() is model.layers[0].q_proj
    merge(model)
    assert model.eval() is model
    assert strip(model).train() is model


def test_settings_of_one_model_are_none_of_anothers():
    """Presets of LyCORIS stand on a class, and the next network has them too."""
    first, second = Net(), Net()
    inject(first, "q_proj", r=3, alpha=5, dropout=0.5, bias="all", variant="dora")
    inject(second, "q_proj", r=1)
    (own,) = second.layers[0].q_proj.lora_adapters
    assert (own.settings.r, own.settings.alpha, own.settings.dropout) == (1, 1.0, 0.0)
    assert own.settings.variant.name == "lora"
    assert not second.head.bias.requires_grad


def test_an_adapter_reaches_earlier_ones_through_layers_in_between():
    """lora-pytorch runs the base without gradients, and cuts what came before it off."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    inject(model, nn.Linear, r=2)
    randomize_adapters(model)
    x = torch.randn(3, 4)
    found = torch.autograd.grad(model(x).square().sum(), lora_parameters(model))
    y = x
    for i in (0, 2, 4):
        layer = model[i]
        y = y @ (layer.weight + layer.lora_B @ layer.lora_A).T + layer.bias
        y = torch.tanh(y) if i < 4 else y
    expected = torch.autograd.grad(y.square().sum(), lora_parameters(model))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_adapter_that_matches_nothing_is_refused():
    """PEFT before 0.18 took it, and saved an empty file."""
    model = Net()
    inject(model, "q_proj", r=2)
    before = snapshot(model)
    with pytest.raises(NoMatchError, match="q_porj"):
        inject(model, "q_porj", r=2, adapter="b")
    assert changed_parts(before, snapshot(model)) == []


def test_a_merge_around_a_disabled_block_is_there_after_it():
    """``disable_adapter`` of PEFT leaves a merged model unmerged."""
    model, x = Net().eval(), ids()
    base = model(x)
    inject(model, "q_proj", r=2)
    randomize_adapters(model)
    merge(model)
    merged = model(x)
    for _ in range(2):
        with disabled(model), disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), merged)
        assert type(model.layers[0].q_proj) is nn.Linear
    unmerge(model)
    assert isinstance(model.layers[0].q_proj.lora_A, nn.Parameter)


def test_an_exception_in_a_forward_leaves_nothing_behind():
    """PEFT's hooks for a batch of several adapters stay where a forward raises."""
    model = Net()
    inject(model, "q_proj", r=2, dropout=0.5)
    before = snapshot(model)
    with pytest.raises(IndexError):
        model(ids() + 100)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("how", ["auto", "weight"])
def test_the_weight_is_a_parameter_of_the_state_dict_after_a_forward(how):
    """LoRA-Torch's is gone after one."""
    model = Net()
    inject(model, "q_proj", r=2, how=how)
    keys = list(model.state_dict())
    for mode in (True, False):
        model.train(mode)(ids()).sum().backward()
        assert list(model.state_dict()) == keys
        assert isinstance(model.layers[0].q_proj._parameters["weight"], nn.Parameter)


def test_an_injection_into_many_layers_asks_no_layer_for_a_second_weight(monkeypatch):
    """PEFT takes 2 ms for a small layer, half of it to initialise weights that it drops."""
    model = nn.ModuleList([nn.Linear(8, 8) for _ in range(500)])

    def refused(*_, **__):
        raise AssertionError("a layer was made")

    monkeypatch.setattr(nn.Linear, "__init__", refused)
    monkeypatch.setattr(nn.Linear, "reset_parameters", refused)
    inject(model, nn.Linear, r=2)
    strip(model)


@pytest.mark.cpu("nothing is computed")
def test_every_test_that_the_tables_name_is_there():
    folder = Path(__file__).parent
    table = (folder / "README.md").read_text().split("## Defects that were reproduced")[1]
    table = table.split("\n## ")[0]
    files = {name: (folder / name).read_text() for name in re.findall(r"`([\w/]+\.py)`", table)}
    for line in table.splitlines():
        own = "".join(files[name] for name in re.findall(r"`([\w/]+\.py)`", line))
        for name in re.findall(r"`(test_\w+)`", line):
            assert f"def {name}(" in own, f"{name} of {line}"
