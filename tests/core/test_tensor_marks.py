"""Parameters that are tied between parts which are adapted on their own, and their marks."""

import io

import pytest
import torch
from helpers import Faults, Net, changed_parts, ids, randomize_adapters, snapshot
from torch import nn

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    UnsupportedLayerError,
    disabled,
    freeze,
    inject,
    lora_state_dict,
    merge,
    remove,
    report,
    save,
    strip,
    use,
)
from lora_inject.training.freeze import freeze_adapter

pytestmark = pytest.mark.cpu("it is about states, not values")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"embed": nn.Embedding(5, 3), "lin": nn.Linear(3, 3)})
        self.b = nn.ModuleDict({"lin": nn.Linear(3, 3), "out": nn.Linear(3, 5, bias=False)})
        self.b["out"].weight = self.a["embed"].weight

    def forward(self, ids):
        x = self.a["lin"](self.a["embed"](ids))
        return self.b["out"](self.b["lin"](x))


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_tied_parameter_stays_frozen_until_both_parts_are_stripped(order):
    model = Tied()
    before = snapshot(model)
    inject(model.a, "lin", r=1)
    inject(model.b, "lin", r=1)
    weight = model.a["embed"].weight
    strip(getattr(model, order[0]))
    assert not weight.requires_grad
    strip(getattr(model, order[1]))
    assert weight.requires_grad
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_what_one_part_trains_the_other_lets_train_and_shows_off_and_on(order):
    model, x = Tied(), ids(vocabulary=5)
    before, plain = snapshot(model), model(x)
    inject(model.b, "lin", r=1)
    inject(model.a, "lin", r=1, train_also="embed", adapter="own")
    weight = model.a["embed"].weight
    assert weight.requires_grad
    with torch.no_grad():
        weight.add_(1)
    freeze(model.b)
    assert weight.requires_grad
    with disabled(model.a):
        assert model.b["out"].weight is model.a["embed"].weight
        assert torch.equal(model(x), plain)
    assert model.b["out"].weight is weight
    for name in order:
        strip(getattr(model, name))
    assert changed_parts(before, snapshot(model)) == []


def test_a_second_part_cannot_train_what_the_first_trains():
    model = Tied()
    inject(model.a, "lin", r=1, train_also="embed")
    before = snapshot(model)
    for call in (
        lambda: inject(model.b, "lin", r=1, train_also="out", adapter="b"),
        lambda: inject(model, "b.lin", r=1, train_also="out", adapter="b"),
    ):
        with pytest.raises(LoRAInjectError, match="tied, and trained already through a part"):
            call()
        assert changed_parts(before, snapshot(model)) == []


def test_one_place_of_what_the_whole_trains_is_not_moved_alone():
    model = Tied()
    clean = snapshot(model)
    inject(model, "lin", r=1, train_also="embed")
    before = snapshot(model)
    for call in (use, strip, lambda m: strip(m, merge=True), lambda m: disabled(m).__enter__()):
        for part in (model.a, model.b):
            with pytest.raises(LoRAInjectError, match="2 tied places, of which some are outside"):
                call(part)
            assert changed_parts(before, snapshot(model)) == []
    strip(model)
    assert changed_parts(clean, snapshot(model)) == []


def test_what_is_tied_in_the_whole_stays_so_where_a_part_trains_it():
    model = Tied()
    inject(model, "lin", r=1)
    inject(model.a, "lin", r=1, train_also="embed", adapter="own")
    weight = model.a["embed"].weight
    for _ in range(2):
        use(model.a)
        assert model.b["out"].weight is model.a["embed"].weight is not weight
        use(model.a, "own")
        assert model.b["out"].weight is model.a["embed"].weight is weight


def test_what_somebody_has_set_of_what_another_part_trains_is_left_alone():
    model = Tied()
    inject(model.b, "lin", r=1, train_also="out")
    weight = model.a["embed"].weight.requires_grad_(False)
    inject(model.a, "lin", r=1)
    assert not weight.requires_grad


def test_a_weight_that_is_tied_to_another_part_is_not_merged():
    model = Tied()
    inject(model, "a.lin", r=1)
    inject(model.a, "embed", r=1, adapter="b")
    randomize_adapters(model)
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match="tied to that of another layer"):
        merge(model.a)
    assert changed_parts(before, snapshot(model)) == []


def test_a_shared_pair_trains_while_one_of_its_places_does():
    model = Tied()
    inject(model, "embed", r=1)
    A = model.a["embed"].lora_A
    assert A is model.b["out"].lora_A
    for _ in range(2):
        use(model.a)
        assert A.requires_grad  # of b
    use(model.b)
    assert not A.requires_grad
    use(model.a, "default")
    assert A.requires_grad
    use(model.b, "default")
    freeze_adapter(model.a, "default")
    assert A.requires_grad
    freeze_adapter(model.b, "default")
    assert not A.requires_grad
    use(model.a, "default")
    strip(model.a)
    assert not A.requires_grad


# --- parts that use one name differently ---------------------------------------------------------


def test_sibling_parts_may_use_one_name_differently():
    model, x = Net(), ids()
    before = snapshot(model)
    for at, part in enumerate(model.layers):
        inject(part, "q_proj", r=1 + at, alpha=2, bias=("none", "all")[at], adapter="fr")
    randomize_adapters(model)
    on = model(x)
    use(model.layers[0])
    half = model(x)
    assert not torch.equal(half, on)
    assert not model.layers[0].q_proj.lora_A_fr.requires_grad
    assert model.layers[1].q_proj.lora_A_fr.requires_grad
    use(model, "fr")
    assert torch.equal(model(x), on)
    use(model.layers[1], {"fr": 1.0}, train=[])
    assert torch.equal(model(x), on)
    for part in reversed(model.layers):
        strip(part)
    assert changed_parts(before, snapshot(model)) == []


def test_an_adapter_with_several_bias_modes_is_no_one_adapter_to_save(tmp_path):
    model = Net()
    inject(model.layers[0], "q_proj", r=1, bias="none")
    inject(model.layers[1], "q_proj", r=1, bias="all")
    before = snapshot(model)
    for call in (
        lambda: save(model, tmp_path / "a"),
        lambda: lora_state_dict(model),
        lambda: inject(model, "head", r=1, bias="all"),
    ):
        with pytest.raises(ArgumentError, match="different bias modes"):
            call()
    assert changed_parts(before, snapshot(model)) == []
    save(model.layers[1], tmp_path / "b")
    freeze(model, bias="all")
    save(model, tmp_path / "a")


def test_what_trains_in_place_needs_one_use_in_all_parts():
    model = Net()
    inject(model, "q_proj", r=1)
    use(model.layers[0], {"default": 0.5})
    before = snapshot(model)
    with pytest.raises(ArgumentError, match="parts use one differently"):
        freeze(model, bias="all")
    assert changed_parts(before, snapshot(model)) == []
    use(model, "default")
    freeze(model, bias="all")
    assert report(model).bias == "all"


# --- tensors that are not in place ---------------------------------------------------------------


@pytest.mark.parametrize("at", range(0, 40, 2))
def test_a_use_that_is_interrupted_between_two_layers_leaves_them_alike(at):
    model = Net()
    inject(model, "q_proj", r=1, adapter="a", bias="all")
    use(model)
    inject(model, "q_proj", r=1, adapter="b", bias="all")
    randomize_adapters(model)
    before = snapshot(model)
    with Faults(at, KeyboardInterrupt, undo=1), pytest.raises(KeyboardInterrupt):
        use(model, "a")
    assert changed_parts(before, snapshot(model)) == []
    use(model, "a")
    use(model, "b")
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("shown", ["use", "disabled"])
@pytest.mark.parametrize("way", ["use", "strip", "remove", "another"])
def test_values_loaded_into_a_bias_while_the_bases_are_shown_are_the_bases(shown, way):
    """As a checkpoint of the base is loaded under ``use(model)``, or inside of a block."""
    model = Net()
    before = snapshot(model)
    inject(model, "q_proj", r=1, bias="all")
    with torch.no_grad():
        model.head.bias.fill_(3)
    new = {"head.bias": torch.full((3,), 7.0)}
    if shown == "use":
        use(model)
        model.load_state_dict(new, strict=False)
    else:
        with disabled(model):
            model.load_state_dict(new, strict=False)
        use(model)
    assert model.head.bias.eq(7).all()
    if way == "another":
        inject(model, "k_proj", r=1, adapter="new", bias="all")
        assert model.head.bias.eq(7).all()
        use(model)
        assert model.head.bias.eq(7).all()
    use(model, "default")
    assert model.head.bias.eq(3).all()  # the adapter's own is not touched
    if way == "use":
        use(model)
        assert model.head.bias.eq(7).all()
    if way == "remove":
        remove(model, "default")
    else:
        strip(model)
    assert model.head.bias.eq(7).all()
    assert set(changed_parts(before, snapshot(model))) == {"state"}


# --- marks and files -----------------------------------------------------------------------------


def test_parameters_and_state_dicts_of_an_adapted_model_load_as_weights_only():
    model = Net()
    inject(model, "q_proj", r=1, bias="all", train_also="head")
    use(model)
    for thing in (
        model.embed.weight,
        model.state_dict(keep_vars=True),
        model.state_dict(),
        list(model.parameters()),
    ):
        file = io.BytesIO()
        torch.save(thing, file)
        file.seek(0)
        torch.load(file, weights_only=True)
