"""The plan: it says what inject would do, refuses what inject refuses, and changes nothing."""

import pytest
import torch
from helpers import Net, linears, snapshot
from torch import nn

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    LoRAInjectWarning,
    NoMatchError,
    disabled,
    inject,
    load,
    merge,
    plan,
    save,
    use,
)

pytestmark = pytest.mark.usefixtures("device")


def test_plan_changes_nothing():
    model = Net()
    before, state = snapshot(model), torch.get_rng_state()
    plan(model, ["q_proj", nn.Embedding], bias="all", train_also="head", layers=None)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_plan_refuses_what_inject_refuses():
    model = Net()
    inject(model, "q_proj")
    with pytest.raises(ArgumentError, match="bias='all'"):
        plan(model, "v_proj", bias="all")


def test_a_plan_printed_afterwards_shows_the_layer_as_it_was():
    model = linears("a")
    shown = plan(model, "a")
    inject(model, "a")
    assert "LoRALinear" not in str(shown)


@pytest.mark.parametrize(
    "arguments", [{"layers": [[0]]}, {"alpha": 10**400}, {"r": 10**30}, {"r": 2**31}]
)
def test_absurd_values_are_refused_by_name(arguments):
    with pytest.raises(ArgumentError, match=f"^{next(iter(arguments))}"):
        plan(Net(), "q_proj", **arguments)


@pytest.mark.parametrize("empty", [(), [], set(), frozenset(), None])
def test_optional_patterns_may_be_empty(empty):
    assert plan(Net(), "q_proj", exclude=empty, train_also=empty).sites


def test_paths_with_braces_in_them():
    model = nn.ModuleDict({"{}": nn.Linear(4, 4), "3": nn.Linear(4, 4)})
    text = str(plan(model, nn.Linear))
    assert "Train in full" not in text
    assert "Skipped" not in text
    assert "{}" in text
    assert " 3 " in text


def test_a_plan_for_a_model_that_has_changed_since_is_refused():
    model = linears("a", "b")
    made = plan(model, "a", r=2)
    model["c"] = nn.Linear(4, 4)
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match="changed"):
        made.apply()
    assert snapshot(model) == before


def test_the_report_says_once_for_each_reason_what_was_not_adapted_and_what_is_too_large():
    made = plan(linears("a", "b"), "all-linear", r=16)
    assert [site.path for site in made.oversized] == ["a", "b"]
    assert plan(linears("a"), "a", r=2).oversized == []  # as many
    with pytest.warns(LoRAInjectWarning, match="1 adapter with .* such as the model itself: 64"):
        inject(nn.Linear(4, 4), nn.Linear, r=8)
    with pytest.warns(LoRAInjectWarning, match="2 adapters with more parameters.* such as a: 128"):
        notes = made.apply().notes
    assert len(notes) == 1
    assert notes[0].startswith("2 adapters with more parameters")
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "max": nn.Linear(4, 4), "also": nn.Linear(4, 4)})
    for name in ("max", "also"):
        model[name].forward = model[name].forward
    (note,) = inject(model, "all-linear", r=1).notes
    assert note.startswith("Not adapted: max and 1 more: ")


def refused(model, message, targets="a", error=LoRAInjectError, **arguments):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        plan(model, targets, r=1, adapter="new", **arguments)
    assert snapshot(model) == before


def test_what_the_state_of_a_model_forbids_is_refused():
    model = linears("a", "b")
    inject(model, "a", r=1)
    with disabled(model):
        refused(model, "inside a disabled block", "b")
    merge(model)
    refused(model, "merged", "b")


def test_what_trains_in_place_has_one_owner_at_a_time(tmp_path):
    model = linears("a", "b")
    inject(model, "a", r=1, train_also="b")
    save(model, tmp_path)
    refused(model, "^'new' is to train .*'default' has trained", train_also="b")
    load(model, tmp_path, adapter="new", other_base=True)  # which waits until it is used
    use(model)
    assert plan(model, "a", r=1, adapter="third", train_also="b").sites
    parts = nn.ModuleDict({"one": linears("a", "b"), "two": linears("a", "b")})
    parts["two"]["b"].weight = parts["one"]["b"].weight
    inject(parts["one"], "a", r=1, train_also="b")
    refused(parts["two"], "tied, and trained already through a part", train_also="b")


def test_arguments_that_could_have_no_effect_are_refused():
    refused(linears("a"), "^a: fixed='B': .* could never learn", fixed="B")
    refused(linears("a", "b"), "^parts: 'b' selects no layer", error=NoMatchError,
            parts={"b": ("q", "k")})  # fmt: skip


def test_the_seed_of_a_plan_is_the_one_of_its_values():
    assert plan(linears("a"), "a", r=1).seed is None
    made = plan(linears("a"), "a", r=1, seed=3)
    assert made.seed == 3
    model, other = linears("a"), linears("a")
    for each in (model, other):
        inject(each, "a", r=1, seed=3)
    assert torch.equal(model["a"].lora_A, other["a"].lora_A)
