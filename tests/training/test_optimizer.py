"""What an optimizer gets: exactly what trains, in groups."""

import pytest
import torch
from helpers import Net, ids, trainable_names

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    LoRAInjectWarning,
    inject,
    lora_parameters,
    merge,
    param_groups,
)

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


def test_an_optimizer_of_a_model_that_is_not_adapted_yet_is_a_warning():
    for call in (lora_parameters, lambda m: param_groups(m, lr=0.1)):
        with pytest.warns(LoRAInjectWarning, match="all of its parameters. Call inject first"):
            call(Net())


def test_adapters_of_embeddings_have_a_rate_of_their_own():
    model = Net()
    inject(model, ["q_proj", "embed"], rows={"head": [1]})
    groups = {g["name"]: g for g in param_groups(model, 0.1, 0.2, 16, lr_embedding=1e-6)}
    assert set(groups) == {"lora_A", "lora_B", "lora_rows", "embedding"}
    assert groups["embedding"]["lr"] == 1e-6
    assert groups["embedding"]["weight_decay"] == 0.2
    assert names_of(model, groups["embedding"]["params"]) == {"embed.lora_A", "embed.lora_B"}
    assert groups["lora_B"]["lr"] == pytest.approx(1.6)
    grouped = [p for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(lora_parameters(model))
    with pytest.raises(ArgumentError, match="lr_embedding must be above 0"):
        param_groups(model, 0.1, lr_embedding=0.0)


def test_a_merged_model_has_nothing_to_optimize():
    model = Net()
    inject(model, "q_proj", r=2)
    merge(model)
    for ask in (lora_parameters, lambda model: param_groups(model, lr=0.1)):
        with pytest.raises(LoRAInjectError, match="merged"):
            ask(model)
