"""LoRA-FA: a factor that stays as it starts, while the other trains."""

import json

import pytest
import torch
from helpers import (
    Net,
    changed_parts,
    ids,
    randomize_adapters,
    snapshot,
    train_steps,
    trainable_names,
)
from stored_models import Tied
from torch import nn

from lora_inject import (
    ArgumentError,
    UnsupportedLayerError,
    combine,
    disabled,
    freeze,
    inject,
    load,
    lora_parameters,
    param_groups,
    report,
    save,
    strip,
    use,
)


def test_one_factor_trains_and_the_other_does_not_move():
    model = Net()
    before = snapshot(model)
    inject(model, {"q_proj": {"fixed": "A"}, "embed": {"fixed": "B"}}, r=2)
    trained = {"embed.lora_A", *(f"layers.{i}.q_proj.lora_B" for i in (0, 1))}
    assert trainable_names(model) == trained
    still = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    train_steps(model, ids())
    assert all(torch.equal(model.get_parameter(name), value) for name, value in still.items())
    assert [group["name"] for group in param_groups(model, lr=1)] == ["lora_A", "lora_B"]
    split = report(model).split
    assert (split["lora_A"], split["lora_B"]) == (2 * 11, 2 * 2 * 8)
    assert all(model.get_parameter(name).any() for name in trained)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_it_stays_fixed_whatever_is_done():
    model = Net()
    inject(model, {"q_proj": {"fixed": "A"}, "embed": {}}, r=2, adapter="fr")
    inject(model, "q_proj", r=2, adapter="de")
    use(model, "de")
    assert not any("fr" in name for name in trainable_names(model))
    use(model, "fr")
    freeze(model)
    with disabled(model):
        pass
    expected = {f"layers.{i}.q_proj.lora_B_fr" for i in (0, 1)}
    assert trainable_names(model) == expected | {"embed.lora_A_fr", "embed.lora_B_fr"}
    use(model, "fr", "de", train="de")
    assert not any("fr" in name for name in trainable_names(model))
    combine(model, {"fr": 1.0, "de": 0.5}, "both")
    use(model, "both")
    assert "layers.0.q_proj.lora_A_both" in trainable_names(model)  # a plain LoRA


def test_the_gradients_are_those_of_both_training():
    one, other = Net().double(), Net().double()
    other.load_state_dict(one.state_dict())
    for model, fixed in ((one, "A"), (other, None)):
        torch.manual_seed(1)
        inject(model, "q_proj", r=2, fixed=fixed, seed=3)
        randomize_adapters(model)
    for model in (one, other):
        model(ids().fill_(3)).square().sum().backward()
    for mine, both in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.q_proj.lora_B.grad, both.q_proj.lora_B.grad)
        assert mine.q_proj.lora_A.grad is None


def test_less_is_kept_for_the_backward_pass():
    kept = {}
    for fixed in (None, "A"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        inject(model, nn.Linear, r=2, fixed=fixed)
        randomize_adapters(model)
        found = {}

        def pack(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(128, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x).sum()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[fixed] = sum(size for at, size in found.items() if at not in own)
    assert kept["A"] < kept[None] / 10


def test_files_say_it_and_others_read_a_plain_lora(tmp_path):
    model = Net()
    inject(model, {"q_proj": {"fixed": "A"}, "v_proj": {}}, r=2)
    randomize_adapters(model)
    save(model, tmp_path / "a")
    again = Net()
    again.load_state_dict(model.state_dict(), strict=False)
    load(again, tmp_path / "a")
    assert trainable_names(again) == trainable_names(model)
    x = ids()
    assert torch.equal(again(x), model(x))
    assert len(lora_parameters(again)) == 6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "fixed" not in config


def test_a_fixed_zero_could_never_learn_and_is_refused():
    model = Net()
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=r"layers.0.q_proj: fixed='B'.*fixed='A'"):
        inject(model, "q_proj", fixed="B")
    with pytest.raises(UnsupportedLayerError, match=r"embed: fixed='A'.*fixed='B'"):
        inject(model, ["q_proj", "embed"], fixed="A")
    assert changed_parts(before, snapshot(model)) == []


def test_what_is_tied_begins_as_what_it_follows():
    model = Tied()
    inject(model, "head", r=2, fixed="A")  # its B is zero, a table's own would be its A
    assert trainable_names(model) == {"emb.lora_B"}  # one tensor on both
    strip(model)
    with pytest.raises(UnsupportedLayerError, match=r"head: fixed='B'.*fixed='A'"):
        inject(model, "head", r=2, fixed="B")


@pytest.mark.parametrize("kept", ["out_in", "in_out"])
def test_experts_that_are_kept_the_other_way_round_keep_the_same_factor(kept, tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(2, 3, 4))
        return nn.ModuleDict({"experts": model})

    model = build()
    inject(model, {"experts.weight": {"layout": kept}}, r=2, fixed="A")
    randomize_adapters(model)
    save(model, tmp_path / "a")
    again = build()
    load(again, tmp_path / "a")
    trains = {n: p.numel() for n, p in again.named_parameters() if p.requires_grad}
    assert list(trains.values()) == [model["experts"].lora_B.numel()]


@pytest.mark.parametrize("wrong", ["a", "AB", 1])
def test_a_wrong_word_is_refused(wrong):
    with pytest.raises(ArgumentError, match=r"fixed must be one of \['A', 'B'\]"):
        inject(Net(), "q_proj", fixed=wrong)
