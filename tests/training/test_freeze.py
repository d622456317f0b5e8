"""What trains: bias modes, modules in full, and gradients that are dropped."""

import copy
import json
import pickle

import pytest
import torch
from families import FAMILIES
from helpers import (
    Net,
    ids,
    linears,
    randomize_adapters,
    snapshot,
    train_steps,
    trainable_names,
)
from torch import nn

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    LoRAInjectWarning,
    NoMatchError,
    UnsupportedLayerError,
    freeze,
    inject,
    load,
    lora_parameters,
    mark_only_lora_as_trainable,
    report,
    save,
    strip,
    use,
)
from lora_inject.core.look import Look
from lora_inject.training.freeze import freeze_adapter

pytestmark = pytest.mark.usefixtures("device")

ADAPTERS = {f"layers.{i}.q_proj.lora_{part}" for i in (0, 1) for part in "AB"}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_bias_modes_train_exactly_what_they_say(bias):
    model = Net()
    expected = {
        "none": set(),
        "all": {name for name, _ in model.named_parameters() if name.endswith(".bias")},
        "lora_only": {"layers.0.q_proj.bias", "layers.1.q_proj.bias"},
    }[bias]
    inject(model, "q_proj", bias=bias)
    assert trainable_names(model) == ADAPTERS | expected
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model, ids())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ADAPTERS | expected


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_bias_modes_agree_with_loralib(bias):
    loralib = pytest.importorskip("loralib")
    theirs = nn.Sequential(loralib.Linear(4, 4, r=2), nn.LayerNorm(4), nn.Linear(4, 4))
    loralib.mark_only_lora_as_trainable(theirs, bias)
    ours = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    inject(ours, "0", r=2, bias=bias)
    assert trainable_names(ours) == trainable_names(theirs)


def test_a_bias_is_what_its_owner_uses_as_one():
    model = nn.ModuleDict(
        {
            "target": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "rnn": nn.LSTM(4, 4, bidirectional=True),
            "relative_attention_bias": nn.Embedding(4, 2),
            "my_bias": nn.Linear(4, 4, bias=False),
        }
    )
    model.register_parameter("q_bias", nn.Parameter(torch.zeros(4)))
    inject(model, "target", bias="all")
    trained = trainable_names(model) - {"target.lora_A", "target.lora_B"}
    assert trained == {
        "q_bias", "target.bias", "attention.in_proj_bias", "attention.out_proj.bias",
        "rnn.bias_ih_l0", "rnn.bias_hh_l0", "rnn.bias_ih_l0_reverse", "rnn.bias_hh_l0_reverse",
    }  # fmt: skip


def test_the_position_bias_of_t5_is_a_weight():
    model = FAMILIES["t5"].build()
    inject(model, "q", r=2, bias="all")
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert name in dict(model.named_parameters())
    assert name not in trainable_names(model)


def test_names_like_ours_are_frozen_like_any_other():
    model = Net()
    model.lora_gate = nn.Linear(8, 8)
    model.register_parameter("lora_A", nn.Parameter(torch.zeros(2)))
    inject(model, "q_proj")
    assert trainable_names(model) == ADAPTERS


def test_frozen_biases_stay_frozen_and_are_not_thawed_by_all():
    model = Net()
    model.layers[0].norm.bias.requires_grad_(False)
    inject(model, "q_proj", bias="all")
    assert not model.layers[0].norm.bias.requires_grad
    assert model.layers[1].norm.bias.requires_grad


def test_biases_that_had_been_frozen_are_mentioned():
    model = linears("a", "b").requires_grad_(False)
    shown = inject(model, "a", r=1, bias="all")
    assert "2 bias parameters had been frozen before" in shown.notes[0]


def test_integer_parameters_are_left_as_they_are():
    model = Net()
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    inject(model, "q_proj", train_also=nn.LayerNorm, bias="all")
    assert not model.table.requires_grad
    assert model.table.dtype == torch.int64
    model.layers[0].table = nn.Parameter(torch.arange(3), requires_grad=False)
    freeze(model, train_also="norm")
    assert report(model).frozen > 0


def test_integer_parameters_cost_no_training_memory():
    model = linears("a")
    before = report(model).memory.full.total
    model.index = nn.Parameter(torch.arange(1000), requires_grad=False)
    assert report(model).memory.full.total == before


def test_train_also_trains_in_full_even_what_was_frozen():
    model = Net()
    model.requires_grad_(False)
    inject(model, "q_proj", train_also=["head", "layers.1.norm"])
    assert trainable_names(model) == ADAPTERS | {
        "head.weight", "head.bias", "layers.1.norm.weight", "layers.1.norm.bias",
    }  # fmt: skip


def test_train_also_that_cannot_be():
    model = Net()
    model.silent = nn.ReLU()
    before = snapshot(model)
    for value, error in [
        ("haed", NoMatchError),
        ("silent", NoMatchError),
        (3, ArgumentError),
        ("q_proj", UnsupportedLayerError),
        ("layers.0", UnsupportedLayerError),
        ({"head": {"r": 2}}, ArgumentError),
    ]:
        with pytest.raises(error):
            inject(model, "q_proj", train_also=value)
        assert snapshot(model) == before
    inject(model, "all-linear", train_also="layers.0")  # all-linear leaves what trains in full
    assert {n.rpartition(".")[0] for n in trainable_names(model) if "lora_" in n} == {
        f"layers.1.{p}_proj" for p in "qkvo"
    }


def test_a_glob_in_train_also_passes_over_what_cannot_train():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
    inject(model, "a", train_also="head*", r=1)
    assert {"head.0.weight", "head.0.bias"} <= trainable_names(model)


def test_train_also_does_not_take_a_parameter_for_a_module():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model.token = nn.Parameter(torch.zeros(1, 4))
    for argument in ("train_also", "exclude"):
        with pytest.raises(NoMatchError, match="names a parameter"):
            inject(model, "fc", **{argument: "token"})


def test_stale_gradients_are_dropped_so_that_no_optimizer_moves_the_base():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(ids()).sum().backward()
    inject(model, "q_proj")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_freeze_alone_and_its_other_name():
    model = Net()
    shown = freeze(model, "all", train_also="head")
    assert mark_only_lora_as_trainable is freeze
    assert trainable_names(model) == {
        name for name, _ in model.named_parameters() if name.endswith(".bias")
    } | {"head.weight"}
    assert shown.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    freeze(model)
    assert trainable_names(model) == set()
    for bad in ({"bias": "lora"}, {"train_also": "haed"}, {"train_also": 3}):
        with pytest.raises((ArgumentError, NoMatchError), match=f"^{next(iter(bad))}"):
            freeze(model, **bad)


def test_freeze_changes_the_mode_of_an_injected_model_and_strip_undoes_it():
    model = Net()
    model.layers[0].norm.bias.requires_grad_(False)
    before = snapshot(model)
    inject(model, "q_proj")
    shown = freeze(model, "all", train_also="head")
    assert shown.bias == "all"
    assert shown.split["train_also"] == model.head.weight.numel() + model.head.bias.numel()
    assert not model.layers[0].norm.bias.requires_grad
    train_steps(model, ids())
    freeze(model, "lora_only")
    assert trainable_names(model) == ADAPTERS | {"layers.0.q_proj.bias", "layers.1.q_proj.bias"}
    train_steps(model, ids())
    strip(model)
    assert snapshot(model) == before


def two_in_use():
    model = Net().eval()
    for name in "ab":
        inject(model, "q_proj", r=2, adapter=name)
    randomize_adapters(model)
    use(model, {"a": 0.5, "b": -1.0}, train="a")
    return model


def test_several_adapters_keep_their_weights_and_all_of_them_train():
    model, x = two_in_use(), ids()
    y, before = model(x), trainable_names(model)
    freeze(model)
    assert torch.equal(model(x), y)
    assert trainable_names(model) == before | {
        f"layers.{i}.q_proj.lora_{part}_b" for i in (0, 1) for part in "AB"
    }
    with pytest.raises(ArgumentError, match="2 adapters are in use"):
        freeze(model, "all")


def test_freeze_is_about_the_adapter_in_use_its_layers_and_its_mode():
    model = Net()
    inject(model, "v_proj", r=2, adapter="a")
    use(model)
    inject(model, "q_proj", r=2, adapter="b")
    freeze(model, "lora_only")
    assert trainable_names(model) == {f"{name}_b" for name in ADAPTERS} | {
        "layers.0.q_proj.bias", "layers.1.q_proj.bias",
    }  # fmt: skip
    assert Look(model).known == {"a": "none", "b": "lora_only"}


def test_what_trains_in_place_belongs_to_one_that_counts_in_full():
    apart, half = Net(), Net()
    for name in "ab":
        inject(apart, {"a": "q_proj", "b": "v_proj"}[name], r=2, adapter=name)
    use(inject(half, "q_proj", r=2) and half, {"default": 0.5})
    for model in (apart, half):
        before = snapshot(model)
        with pytest.raises(ArgumentError, match="belongs to one, with a weight of 1"):
            freeze(model, "all")
        assert snapshot(model) == before


def test_what_one_owner_trained_in_place_trains_no_more_and_others_wait_as_they_were():
    model = Net()
    inject(model, "q_proj", r=2, adapter="a", train_also="head")
    use(model, train="a")  # in no use, and trains on
    inject(model, "v_proj", r=2, adapter="b", train_also="layers.0.norm")
    use(model, "b", train=["a", "b"])
    former = report(model).to_dict()
    freeze(model, train_also="layers.1.norm")
    names = trainable_names(model)
    assert {"layers.1.norm.weight", "layers.1.norm.bias"} <= names
    assert not {"layers.0.norm.weight", "layers.0.norm.bias"} & names
    use(model, "a")
    assert model.head.weight.requires_grad
    assert former["bias"] == report(model).to_dict()["bias"]


def test_a_module_that_trains_in_full_no_more_has_statistics_that_stand_still():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    inject(model, "0", r=2, train_also="1")
    freeze(model, train_also="2")
    before = [model[i].running_mean.clone() for i in (1, 2)]
    model.train()(torch.randn(8, 4))
    assert torch.equal(model[1].running_mean, before[0])
    assert not torch.equal(model[2].running_mean, before[1])


def test_one_adapter_is_frozen_and_others_train_on():
    model = two_in_use()
    use(model, "a", "b")
    both = trainable_names(model)
    freeze_adapter(model, "a")
    assert trainable_names(model) == {name for name in both if not name.endswith("_a")}
    freeze_adapter(model, "a")
    assert trainable_names(model) == {name for name in both if not name.endswith("_a")}


@pytest.mark.parametrize("second", ["q_proj", "v_proj"])
def test_freezing_one_adapter_leaves_what_somebody_has_set_of_others(second):
    model = Net()
    inject(model, "q_proj", r=2, adapter="a")
    inject(model, second, r=2, adapter="b")
    use(model, "a", "b")
    model.layers[0].get_submodule(second).lora_A_b.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    before = trainable_names(model)
    freeze_adapter(model, "a")
    assert trainable_names(model) == {name for name in before if not name.endswith("_a")}


def test_loading_what_is_not_to_train_leaves_what_somebody_has_set_of_others(tmp_path):
    model = two_in_use()
    save(model, tmp_path, adapter="a")
    use(model, "a", "b")
    model.layers[0].q_proj.lora_A_b.requires_grad_(False)
    before = trainable_names(model)
    load(model, tmp_path, adapter="a", trainable=False)
    assert trainable_names(model) == {name for name in before if not name.endswith("_a")}


def test_freeze_freezes_again_what_somebody_has_let_train():
    model = Net()
    inject(model, "q_proj")
    model.requires_grad_(True)
    model(ids()).sum().backward()
    model.layers[0].q_proj.lora_B.requires_grad_(False)
    freeze(model)
    assert trainable_names(model) == ADAPTERS
    assert {name for name, p in model.named_parameters() if p.grad is not None} == ADAPTERS


def test_the_bias_mode_of_a_second_adapter_trains_what_it_says():
    model = Net()
    inject(model, "q_proj", adapter="a")
    use(model)
    inject(model, "v_proj", adapter="b", bias="all")
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert trainable_names(model) == biases | {
        f"layers.{i}.v_proj.lora_{part}_b" for i in (0, 1) for part in "AB"
    }


def test_freeze_alone_leaves_frozen_biases_frozen():
    model = Net()
    model.head.bias.requires_grad_(False)
    freeze(model, "all")
    assert "head.bias" not in trainable_names(model)
    assert "layers.0.q_proj.bias" in trainable_names(model)


def test_adapters_do_not_train_in_full():
    model = Net()
    inject(model, "q_proj")
    with pytest.raises(UnsupportedLayerError):
        freeze(model, train_also="layers.0")


def test_what_is_trained_through_a_part_is_not_frozen_for_the_whole():
    model = linears("a", "b")
    model["b"].bias = model["a"].bias
    inject(model["a"], nn.Linear, r=1, bias="all")
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match="tied, and trained already through a part"):
        freeze(model, bias="all")
    assert snapshot(model) == before


def test_a_head_that_freeze_lets_train_is_missed_when_it_is_gone():
    model = Net()
    inject(model, "q_proj", r=2)
    freeze(model, train_also="head")
    model.head = nn.Linear(8, 3)
    with pytest.warns(LoRAInjectWarning, match="head"):
        lora_parameters(model)


def test_what_is_gone_is_missed_until_freeze_takes_the_model_as_it_is():
    model = Net()
    inject(model, "q_proj", r=2)
    model.layers[1].q_proj = nn.Linear(8, 8)
    with pytest.warns(LoRAInjectWarning, match=r"layers\.1\.q_proj had something"):
        freeze(model)
    lora_parameters(model)
    model.layers[0].q_proj = nn.Linear(8, 8)
    with pytest.warns(LoRAInjectWarning, match=r"^layers\.0\.q_proj had something"):
        lora_parameters(model)


def test_what_another_adapter_trains_in_full_stays_its_own(tmp_path):
    """Of the one in use that is what freeze says, and no more what inject said."""
    model = Net()
    inject(model, "q_proj", r=2, adapter="a", train_also="head")
    inject(model, "v_proj", r=2, adapter="b", train_also="layers.0.norm")
    randomize_adapters(model)
    use(model, "b")
    freeze(model, train_also="layers.1.norm")

    def saved(adapter):
        save(model, tmp_path / adapter, adapter=adapter)
        return json.loads((tmp_path / adapter / "adapter_config.json").read_text())

    for _ in range(2):
        assert saved("a")["modules_to_save"] == ["head"]
        assert saved("b")["modules_to_save"] == ["layers.1.norm"]
    model.head = nn.Linear(8, 3)
    with pytest.warns(LoRAInjectWarning, match="^head had something"):
        lora_parameters(model)


def test_what_was_taken_out_altogether_is_missed_no_more_after_freeze():
    model = linears("a", "b")
    inject(model, nn.Linear, r=1)
    del model["b"]
    with pytest.warns(LoRAInjectWarning, match="^b had something"):
        freeze(model)
    lora_parameters(model)


def test_an_adapter_gets_its_own_values_of_what_another_trained_in_place():
    model = Net()
    inject(model, "q_proj", r=2, adapter="a", train_also="head")
    inject(model, "v_proj", r=2, adapter="b")
    base = model.head.weight.detach().clone()
    use(model, "a")
    train_steps(model, ids())
    trained = model.head.weight.detach().clone()
    use(model, "b")
    freeze(model, train_also="head")
    assert torch.equal(model.head.weight, base)
    train_steps(model, ids())
    assert not torch.equal(model.head.weight, base)
    use(model, "a")
    assert torch.equal(model.head.weight, trained)
    strip(model)
    assert torch.equal(model.head.weight, base)


def test_statistics_of_an_adapter_that_waits_are_no_parameters_after_freeze():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject(model, "0", r=1, adapter="a", train_also="1")
    inject(model, "0", r=1, adapter="b")
    use(model, "b")
    freeze(model)
    use(model, "a")
    assert not any(buffer.requires_grad for buffer in model.buffers())
    owners = [t.owners for _, t in Look(model).trained if not t.is_parameter]
    assert owners == [{"a": False}] * 3


def test_a_frozen_model_is_copied_and_pickled():
    model = Net()
    inject(model, "q_proj", r=2, adapter="a", train_also="head")
    inject(model, "v_proj", r=2, adapter="b")
    use(model, "b")
    freeze(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        use(again, "a")
        assert again.head.weight.requires_grad
        assert report(again).trainable == report(use(copy.deepcopy(model), "a")).trainable


def test_a_plain_model_keeps_its_modules_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = vars(model[0]).keys()
    freeze(model)
    assert vars(model[0]).keys() == before
    assert not model[0]._forward_hooks | model[0]._forward_pre_hooks


@pytest.mark.parametrize("bias", ["all", "none"])
def test_freeze_says_what_trains_of_layers_with_more_than_a_and_b(bias):
    model = linears("a")
    inject(model, "a", r=1, bias="all")
    model["a"].lora_A.requires_grad_(False)
    model["a"].bias.requires_grad_(False)
    freeze(model, bias=bias)
    assert model["a"].lora_A.requires_grad
    assert model["a"].bias.requires_grad is (bias == "all")
