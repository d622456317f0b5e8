"""What an optimizer gets: exactly what trains, in groups."""

import pytest
import torch
from helpers import Net, ids, trainable_names
from torch import nn

from lora_inject import ArgumentError, LoRAInjectError, inject, lora_parameters, param_groups
from lora_inject.core.look import Look
from lora_inject.core.roles import roles
from lora_inject.kinds.bias import is_bias

pytestmark = pytest.mark.cpu("nothing is computed")


def names_of(model, parameters):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in parameters}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_parameters_are_exactly_what_trains(bias):
    model = Net()
    inject(model, ["q_proj", "embed"], bias=bias, train_also="head")
    parameters = lora_parameters(model)
    assert names_of(model, parameters) == trainable_names(model)
    assert len(parameters) == len(set(parameters))
    grouped = [p for group in param_groups(model, lr=0.1) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(parameters)


def test_groups_carry_lora_plus_rates_and_no_decay_on_biases():
    model = Net()
    inject(model, "q_proj", bias="lora_only", train_also="head")
    groups = {g["name"]: g for g in param_groups(model, lr=0.1, weight_decay=0.2, lr_ratio=16)}
    assert set(groups) == {"lora_A", "lora_B", "bias", "train_also"}
    assert groups["lora_A"]["lr"] == groups["bias"]["lr"] == groups["train_also"]["lr"] == 0.1
    assert groups["lora_B"]["lr"] == pytest.approx(1.6)
    assert groups["bias"]["weight_decay"] == 0.0
    assert {groups[g]["weight_decay"] for g in ("lora_A", "lora_B", "train_also")} == {0.2}
    assert names_of(model, groups["bias"]["params"]) == {
        "layers.0.q_proj.bias", "layers.1.q_proj.bias", "head.bias",
    }  # fmt: skip
    assert names_of(model, groups["train_also"]["params"]) == {"head.weight"}

    optimizer = torch.optim.AdamW(list(groups.values()))
    model(ids()).sum().backward()
    optimizer.step()
    held = set(optimizer.state)
    assert held == set(lora_parameters(model))


def test_empty_groups_are_left_out():
    model = Net()
    inject(model, "q_proj")
    assert [g["name"] for g in param_groups(model, lr=1)] == ["lora_A", "lora_B"]


@pytest.mark.parametrize(
    "bad", [{"lr": 0}, {"lr": -1}, {"lr": float("nan")}, {"weight_decay": -1}, {"lr_ratio": 0}]
)
def test_bad_numbers_are_named(bad):
    model = Net()
    inject(model, "q_proj")
    with pytest.raises(ArgumentError, match=f"^{next(iter(bad))} "):
        param_groups(model, **{"lr": 0.1, **bad})


def test_a_model_in_which_nothing_trains():
    model = Net().requires_grad_(False)
    for call in (lora_parameters, lambda m: param_groups(m, lr=0.1)):
        with pytest.raises(LoRAInjectError, match="no parameter"):
            call(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bias", True), ("in_proj_bias", True), ("bias_hh_l0_reverse", True), ("weight", False),
     ("biases", False), ("relative_position_bias_table", False), ("lora_A", False)],
)  # fmt: skip
def test_the_name_of_a_bias(name, expected):
    owner = nn.Module()
    owner.register_parameter(name, nn.Parameter(torch.zeros(3)))
    assert is_bias(owner, name) == expected


def test_a_matrix_is_a_bias_beside_its_weight_only():
    owner = nn.Module()
    owner.up_proj = nn.Parameter(torch.zeros(2, 3, 4))
    owner.up_proj_bias = nn.Parameter(torch.zeros(2, 3))
    owner.relative_attention_bias = nn.Parameter(torch.zeros(32, 8))
    assert is_bias(owner, "up_proj_bias")
    assert not is_bias(owner, "relative_attention_bias")
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert is_bias(attention, "bias_k")


def test_every_parameter_has_one_role():
    model = Net()
    model.tied = nn.Linear(8, 11, bias=False)
    model.tied.weight = model.embed.weight
    inject(model, "q_proj", train_also="tied")
    role_of = roles(Look(model))
    assert list(role_of) == list(model.parameters())
    assert role_of[model.embed.weight] == "train_also"
    assert role_of[model.layers[0].q_proj.lora_A] == "lora_A"
    assert role_of[model.layers[0].norm.weight] == "other"
