"""strip and remove bring back what was there, in any order and after whatever else happened."""

import copy
import itertools
import warnings

import pytest
import torch
from helpers import (
    Faults,
    Net,
    changed_parts,
    ids,
    linears,
    randomize_adapters,
    snapshot,
    train_steps,
)
from torch import nn
from torch.nn.utils import parametrize, prune

from lora_inject import (
    LoRAInjectError,
    LoRAInjectWarning,
    combine,
    disabled,
    freeze,
    inject,
    load,
    lora_state_dict,
    merge,
    remove,
    reset_lora_parameters,
    save,
    strip,
    unmerge,
    use,
)
from lora_inject.core.lend import lend, take_back
from lora_inject.core.look import Look
from lora_inject.core.state import state_of

pytestmark = pytest.mark.cpu("it is about states, not values")


def test_strip_with_merge_keeps_a_trained_head():
    model = Net()
    inject(model, "q_proj", r=2, bias="all", train_also="head")
    train_steps(model, ids())
    x = ids()
    before, trained = model(x), model.head.weight.detach().clone()
    strip(model, merge=True)
    assert torch.equal(model.head.weight, trained)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("names", list(itertools.permutations(["first", "second", "whole"])))
def test_shared_modules_are_stripped_in_any_order(names):
    model = nn.Module()
    model.first, model.second = nn.Sequential(Net().layers[0]), nn.Sequential()
    model.second.append(model.first[0])
    before = snapshot(model)
    inject(model.first, "q_proj", r=2)
    inject(model.second, "k_proj", r=2, adapter="b", bias="all")
    randomize_adapters(model)
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoRAInjectWarning)  # the last ones find no adapter
            strip(model if name == "whole" else model.get_submodule(name))
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("at", [0, 1, 5, 9, 20, 40])
def test_a_strip_after_one_that_failed_finds_everything(at):
    model = Net()
    before = snapshot(model)
    inject(model, "q_proj", r=2, bias="all", train_also="head")
    train_steps(model, ids())
    with Faults(at, MemoryError, undo=2), pytest.raises(MemoryError):
        strip(model)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_an_allocation_that_fails_in_strip_loses_nothing(monkeypatch):
    model = Net()
    before = snapshot(model)
    inject(model, "q_proj", r=2, bias="all", train_also="head")
    train_steps(model, ids())
    trained, clone, calls = snapshot(model), torch.Tensor.clone, []

    def failing(tensor, **options):
        calls.append(tensor)
        if len(calls) == 4:
            raise MemoryError("no")
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", failing)
    with pytest.raises(MemoryError):
        strip(model)
    monkeypatch.undo()
    assert changed_parts(trained, snapshot(model)) == []
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("at", range(0, 60, 3))
def test_combine_that_fails_leaves_nothing_that_strip_does_not_take_out(at):
    model = Net()
    before = snapshot(model)
    inject(model, "q_proj", r=2, adapter="a")
    with Faults(at, KeyboardInterrupt) as faults:
        try:
            combine(model, {"a": 1.0}, "c")
        except KeyboardInterrupt:
            assert not any("_c" in name for name, _ in model.named_parameters())
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    assert faults.raised or at > 10


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("change", ["parametrized", "pruned"])
def test_a_frozen_layer_that_is_taken_apart_after_inject_trains_again(change, bias):
    model = Net()
    flags = {id(p): p.requires_grad for p in model.parameters()}
    inject(model, "q_proj", r=2, bias=bias)
    layer = model.layers[0].o_proj
    if change == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
        moved = layer.weight_orig
    else:
        parametrize.register_parametrization(layer, "weight", nn.Identity())
        moved = layer.parametrizations.weight.original
    assert not moved.requires_grad
    strip(model)
    assert moved.requires_grad
    assert all(p.requires_grad is flags.get(id(p), True) for p in model.parameters())
    assert not any(vars(p) for p in model.parameters())


def test_what_was_lent_is_noted_once_however_often():
    model = Net()
    before = snapshot(model)
    inject(model, "q_proj", r=2)
    for _ in range(3):
        lend(model, "note", object())
    assert state_of(model).reach.lent == (("note", ()),)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_what_was_lent_stays_until_the_last_adapter_goes():
    model = Net()
    inject(model, "q_proj", r=2, adapter="a")
    lend(model, "note", "ours")
    inject(model, "v_proj", r=2, adapter="b")
    use(model, "b")
    freeze(model)
    remove(model, "a")
    assert model.note == "ours"
    strip(model)
    assert not hasattr(model, "note")


@pytest.mark.parametrize("way", [strip, lambda model: take_back(model, "note")])
def test_what_an_attribute_was_before_it_was_lent_comes_back(way):
    model = Net()
    model.note = "the user's"
    inject(model, "q_proj", r=2)
    lend(model, "note", "ours")
    lend(model, "note", "ours again")
    way(copy.deepcopy(model))
    assert model.note == "ours again"
    way(model)
    assert model.note == "the user's"


def test_freeze_of_the_whole_holds_when_a_part_is_stripped_and_goes_with_the_whole():
    model = Net()
    before = snapshot(model)
    inject(model.layers[0], "q_proj", r=2)
    freeze(model)
    assert not model.head.weight.requires_grad
    strip(model.layers[0])
    assert not any(p.requires_grad for p in model.parameters())
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


# --- a part, and a copy of a part ----------------------------------------------------------------


def whole():
    model = Net()
    inject(model, ["q_proj", "v_proj"], r=2, bias="lora_only")
    randomize_adapters(model)
    with torch.no_grad():
        model.layers[0].q_proj.bias.add_(1)
    return model


@pytest.fixture(params=["part", "copy"])
def part(request):
    model = whole()
    return model.layers[0] if request.param == "part" else copy.deepcopy(model.layers[0])


def test_a_part_does_what_a_model_does(part):
    x = torch.randn(2, 8)
    plain = Net().layers[0].eval()
    on = part(x)
    with disabled(part):
        base = part(x)
    assert not torch.equal(on, base)
    use(part)
    assert torch.equal(part(x), base)
    use(part, "default")
    assert torch.equal(part(x), on)
    merge(part, keep="cpu")
    torch.testing.assert_close(part(x), on)
    unmerge(part)
    assert torch.equal(part(x), on)
    inject(part, "k_proj", r=2, adapter="more")
    assert torch.equal(part(x), on)
    remove(part, "more")
    assert torch.equal(part(x), on)
    strip(part)
    assert torch.equal(part(x), base)
    assert list(part.state_dict()) == list(plain.state_dict())
    assert not any(p.requires_grad for p in part.parameters())  # frozen from above


def test_a_part_refuses_by_path_what_only_the_whole_can_answer(part, tmp_path):
    before = snapshot(part)
    for call in (
        lambda: save(part, tmp_path / "a"),
        lambda: lora_state_dict(part),
        lambda: combine(part, {"default": 1.0}, "c"),
        lambda: freeze(part),
    ):
        with pytest.raises(LoRAInjectError, match=r"larger model.* Call this on the model that"):
            call()
    assert changed_parts(before, snapshot(part)) == []


def test_a_part_with_one_place_of_a_tied_adapter_says_what_it_cannot():
    model = nn.ModuleDict({"a": nn.Embedding(5, 3), "b": nn.Linear(3, 5, bias=False)})
    model["b"].weight = model["a"].weight
    before = snapshot(model)
    inject(model, "a", r=1)
    alone = copy.deepcopy(model["b"])
    with pytest.raises(LoRAInjectError, match="shares its A and B with a"):
        reset_lora_parameters(alone)
    strip(model["a"])
    with pytest.raises(LoRAInjectError, match="shares its A and B with a"):
        lora_state_dict(model)  # which would lose what b still has
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_buffers_that_have_all_gone_since_come_back():
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    inject(model, "fc", r=1, train_also="norm")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name in before:
        setattr(model["norm"], name.removeprefix("norm."), None)
    strip(model)
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_place_that_something_has_replaced_is_told_where_it_trained():
    model = linears("a", "b", "c")
    model["c"].bias.requires_grad_(False)
    inject(model, "a", r=1)
    for name in "bc":
        del model[name].bias
        model[name].register_buffer("bias", None)
    with pytest.warns(LoRAInjectWarning, match=r"^b\.bias is gone: .* left as it is\.$"):
        strip(model)


def test_of_a_part_that_is_stripped_other_places_are_not_told():
    model = linears("a", "b")
    inject(model["a"], nn.Linear, r=1)
    inject(model["b"], nn.Linear, r=1, adapter="other")
    del model["b"].bias
    model["b"].register_buffer("bias", None)
    strip(model["a"])
    with pytest.warns(LoRAInjectWarning, match=r"^bias is gone"):
        strip(model["b"])


def test_removing_one_adapter_leaves_what_somebody_has_set_of_others():
    model = linears("a")
    for name in ("first", "second"):
        inject(model, "a", r=1, adapter=name)
    use(model, "first", "second")
    model["a"].lora_A_second.requires_grad_(False)
    remove(model, "first")
    assert not model["a"].lora_A_second.requires_grad
    assert model["a"].lora_B_second.requires_grad
    own = state_of(copy.deepcopy(model)["a"]).use
    assert (own.weights, own.trains) == ({"second": 1.0}, {"second"})
    assert Look(model).roots == {call.id for call in Look(model).injections}


def test_a_place_that_something_has_replaced_is_told_when_the_last_adapter_goes():
    model = linears("a", "b")
    for name in ("first", "second"):
        inject(model, "a", r=1, adapter=name)
    del model["b"].bias
    model["b"].register_buffer("bias", None)
    remove(model, "first")
    with pytest.warns(LoRAInjectWarning, match=r"^b\.bias is gone"):
        strip(model)


def test_a_norm_that_was_converted_stands_still_until_the_last_adapter_goes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    for name in ("first", "second"):
        inject(model, "0", r=1, adapter=name)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    remove(model, "first")
    assert not model[1].track_running_stats
    strip(model)
    assert model[1].track_running_stats


def test_what_stays_needs_no_former_value():
    model = Net()
    inject(model, "q_proj", r=2, train_also="head")
    model.head.weight = nn.Parameter(torch.zeros(5, 8))
    with pytest.raises(LoRAInjectError, match="has the shape"):
        strip(model)
    strip(model, merge=True)
    assert torch.equal(model.head.weight, torch.zeros(5, 8))


def test_what_a_removed_adapter_trained_in_full_stands_still():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    inject(model, "fc", r=1, adapter="first", train_also="norm")
    use(model)
    inject(model, "fc", r=1, adapter="second")
    use(model, "first")
    remove(model, "first")
    former = model["norm"].running_mean.clone()
    model.train()["norm"](torch.randn(8, 4))
    assert torch.equal(model["norm"].running_mean, former)
    inject(model, "fc", r=1, adapter="first")
    assert not Look(model).in_full
    assert all("first" not in state.reach.tops for state in Look(model).states.values())


@pytest.mark.parametrize("others", [0, 1])
def test_what_is_in_use_stays_with_its_weight_when_the_first_adapter_is_gone(tmp_path, others):
    """The base's own bias holds its former value then; the adapter in use has another."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    own = model[0].bias
    inject(model, "0", r=2, bias="all", train_also="1")
    train_steps(model, torch.randn(8, 4).double())
    save(model, tmp_path)
    for name in ["x", "y"][: 1 + others]:
        load(model, tmp_path, adapter=name)
    remove(model, "default")
    use(model, "x")
    x, bias = torch.randn(8, 4).double(), model[0].bias.detach().clone()
    before, moved = model.eval()(x), model[1].running_mean.clone()
    strip(model, merge=True)
    torch.testing.assert_close(model(x), before)
    assert model[0].bias is own
    assert torch.equal(own, bias)
    assert torch.equal(model[1].running_mean, moved)


def test_a_buffer_that_is_gone_is_told_before_strip_changes_anything():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    inject(model, "0", r=1, train_also="1")
    del model[1].running_mean
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match=r"running_mean of .*it is no buffer of its module"):
        strip(model)
    assert not changed_parts(before, snapshot(model))
    model[1].register_buffer("running_mean", torch.ones(3))
    strip(model)
    assert torch.equal(model[1].running_mean, torch.zeros(3))


def test_what_another_adapter_has_lost_is_not_in_the_way():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    inject(model, "0", r=1, adapter="a")
    inject(model, "0", r=1, adapter="b", train_also="1")
    del model[1].running_mean
    remove(model, "a")
    with pytest.raises(LoRAInjectError, match="running_mean"):
        remove(model, "b")
