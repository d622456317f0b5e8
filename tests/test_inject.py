"""Inject and strip: all or nothing, one object under two names, and the way back bit for bit."""

import copy
import gc
import importlib
import io
import pickle
import warnings
import weakref

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
    trainable_names,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_inject import (
    AlreadyAdaptedError,
    ArgumentError,
    LoRAInjectError,
    LoRAInjectWarning,
    LoRALayer,
    UnsupportedLayerError,
    disabled,
    freeze,
    inject,
    report,
    reset_lora_parameters,
    strip,
    use,
)
from lora_inject.core.scales import SCALES

pytestmark = pytest.mark.usefixtures("device")


def injected(**arguments):
    model = Net()
    before = snapshot(model)
    inject(model, ["q_proj", "embed"], r=2, **arguments)
    return model, before


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("train_also", [(), ["head", "norm"]])
def test_strip_after_training_restores_everything(bias, train_also):
    model, before = injected(bias=bias, train_also=train_also, dropout=0.1)
    x = ids()
    train_steps(model, x)
    trained = model(x)
    model.eval()
    assert strip(model) is model
    assert changed_parts(before, snapshot(model)) == []
    assert not torch.equal(model(x), trained)
    assert all(p.grad is None for p in model.parameters())


def test_strip_restores_flags_modes_hooks_and_attributes():
    model = Net()
    model.head.weight.requires_grad_(False)
    model.layers[0].eval()
    seen = []
    handle = model.layers[0].q_proj.register_forward_hook(lambda m, a, y: seen.append(y))
    model.layers[1].q_proj.note = {"mine": 1}
    before = snapshot(model)
    inject(model, "q_proj", r=2, bias="all")
    randomize_adapters(model)
    model.train()
    model(ids())
    adapted = model.layers[0].q_proj(torch.ones(8))
    assert torch.equal(seen[-1], adapted)  # the user's hook sees the adapted output
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    assert model.layers[1].q_proj.note == {"mine": 1}
    handle.remove()
    assert not model.layers[0].q_proj._forward_hooks


def test_the_model_stays_the_same_object_with_the_same_parts():
    model = Net()
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    keys, attributes = list(model.state_dict()), set(vars(model))
    inject(model, "q_proj", r=2)
    assert list(model.modules()) == modules
    assert type(model) is Net
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert [key for key in model.state_dict() if "lora_" not in key] == keys
    assert len(set(vars(model)) - attributes) == 1  # the record


def test_strip_without_adapters_says_so_and_changes_nothing():
    model = Net()
    before = snapshot(model)
    with pytest.warns(LoRAInjectWarning, match="no adapters"):
        assert strip(model) is model
    assert snapshot(model) == before
    inject(model, "q_proj")
    strip(model)
    with pytest.warns(LoRAInjectWarning):
        strip(model)


def test_strip_changes_nothing_when_it_cannot_finish():
    model = linears("a", "head")
    inject(model, "a", r=1, train_also="head")
    model["head"].weight = nn.Parameter(torch.randn(6, 4))
    state = snapshot(model)
    with pytest.raises(LoRAInjectError, match=r"\(4, 4\).*\(6, 4\)"):
        strip(model)
    assert snapshot(model) == state


def test_strip_of_a_deepcopy_leaves_the_original_adapted():
    model, before = injected(bias="all", train_also="head")
    x = ids()
    train_steps(model, x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    output = model(x)
    strip(twin)
    assert not any(isinstance(m, LoRALayer) for m in twin.modules())
    assert torch.equal(model(x), output)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.requires_grad == other.requires_grad


def test_the_adapted_layers_of_a_copy_are_those_of_the_copy():
    model = Net()
    inject(model, "q_proj", r=1)
    twin = copy.deepcopy(model)
    randomize_adapters(twin)
    x = ids()
    assert not torch.equal(model(x), twin(x))
    strip(twin)
    assert type(model.layers[0].q_proj).__name__ == "LoRALinear"


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_strip_after_pickling(protocol):
    model, before = injected(bias="all")
    x = ids()
    train_steps(model, x)
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(loaded(x), model(x))
    assert type(loaded.embed) is type(model.embed)
    strip(loaded)
    assert [(n, d, b) for n, d, b in snapshot(loaded)["state"]] == before["state"]
    assert trainable_names(loaded) == {name for name, _, flag in before["parameters"] if flag}


def test_torch_save_of_the_whole_model():
    model, before = injected()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = ids()
    assert torch.equal(loaded(x), model(x))
    strip(loaded)
    assert snapshot(loaded)["state"] == before["state"]


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_strip_after_a_cast_gives_the_cast_values(cast):
    model, _ = injected(bias="all", train_also="head")
    reference = copy.deepcopy(model)
    strip(reference)
    getattr(reference, cast)()
    train_steps(model, ids())
    getattr(model, cast)()
    strip(model)
    assert snapshot(model)["state"] == snapshot(reference)["state"]


def test_strip_through_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model, before = injected()
    wrapper = Wrapper(model)
    assert strip(wrapper) is wrapper
    assert changed_parts(before, snapshot(model)) == []

    model = Net()
    compiled = torch.compile(model, backend="eager")
    before = snapshot(model)
    inject(model, "q_proj")
    strip(compiled)
    assert changed_parts(before, snapshot(model)) == []


def test_a_part_of_an_adapted_model_is_stripped_alone_and_stays_frozen():
    model, before = injected()
    state = snapshot(model)
    with pytest.raises(LoRAInjectError, match="larger model"):
        freeze(model.layers[0])
    assert snapshot(model) == state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strip(model.layers[0])
    assert not any(isinstance(m, LoRALayer) for m in model.layers[0].modules())
    assert isinstance(model.layers[1].q_proj, LoRALayer)
    assert not any(p.requires_grad for p in model.layers[0].parameters())  # frozen from above
    with pytest.warns(LoRAInjectWarning, match="larger model"):
        strip(model.layers[0])
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_a_copy_of_a_part_can_be_used_and_stripped():
    model, _ = injected()
    randomize_adapters(model)
    part = copy.deepcopy(model.layers[0])
    x = torch.randn(2, 8)
    with disabled(model.layers[0]):
        base = model.layers[0](x)
    on = part(x)
    assert torch.equal(on, model.layers[0](x))
    assert not torch.equal(on, base)
    use(part)
    assert torch.equal(part(x), base)
    assert torch.equal(model.layers[0](x), on)
    strip(part)
    assert torch.equal(part(x), base)
    assert set(part.state_dict()) == set(Net().layers[0].state_dict())
    assert torch.equal(model.layers[0](x), on)


def test_a_module_under_two_names_is_adapted_once():
    model = nn.Module()
    model.a = model.b = nn.Linear(4, 4)
    before = snapshot(model)
    shown = inject(model, "b", r=2)
    assert model.a is model.b
    assert isinstance(model.a, LoRALayer)
    assert shown.trainable == 16
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_tied_parameters_stay_tied_and_are_counted_once():
    model = Net()
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embed.weight
    total = sum(p.numel() for p in model.parameters())
    before = snapshot(model)
    shown = inject(model, ["embed", "head"], r=2)
    assert shown.frozen == total
    assert shown.trainable == 2 * (8 + 11)
    train_steps(model, ids())
    strip(model)
    assert model.head.weight is model.embed.weight
    assert changed_parts(before, snapshot(model)) == []


def test_an_adapted_layer_is_not_adapted_again():
    model, _ = injected()
    state = snapshot(model)
    for targets in ("q_proj", "all-linear", nn.Embedding):
        with pytest.raises(AlreadyAdaptedError, match="'default'"):
            inject(model, targets)
    assert snapshot(model) == state


def test_a_second_inject_adds_layers_and_one_strip_undoes_both():
    model, before = injected(bias="all", train_also="head")
    first = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.embed.lora_A.requires_grad_(False)  # the user's decision, which must stay
    inject(model, "v_proj", r=4, bias="all")
    assert not model.embed.lora_A.requires_grad
    assert trainable_names(model) == (set(first) - {"embed.lora_A"}) | {
        f"layers.{i}.v_proj.lora_{part}" for i in (0, 1) for part in "AB"
    }
    train_steps(model, ids())
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_a_second_inject_with_another_bias_mode_is_refused():
    model, _ = injected(bias="lora_only")
    with pytest.raises(ArgumentError, match="bias='none'"):
        inject(model, "v_proj")


@pytest.mark.parametrize("order", ["part first", "whole first"])
@pytest.mark.parametrize("strip_part", [False, True])
def test_injecting_into_a_part_and_into_the_whole(order, strip_part):
    model = Net()
    before = snapshot(model)
    part = lambda: inject(model.layers[0], "q_proj", r=2)  # noqa: E731
    whole = lambda: inject(model, "head", r=2)  # noqa: E731
    for call in (part, whole) if order == "part first" else (whole, part):
        call()
    randomize_adapters(model)
    x = ids()
    train_steps(model, x)
    if strip_part:
        strip(model.layers[0])
        assert trainable_names(model) == {"head.lora_A", "head.lora_B"}
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_a_part_of_an_adapted_model_is_adapted_on_its_own():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    before = snapshot(model)
    inject(model, "0.0", r=1, bias="all")
    state = snapshot(model)
    with pytest.raises(ArgumentError, match="bias='all'"):
        inject(model[0], "1", r=1)
    assert snapshot(model) == state
    inject(model[0], "1", r=1, bias="all")
    inject(model[0], "1", r=1, adapter="fr")
    strip(model[0])
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    assert trainable_names(model) == {"1.bias"}  # the rest of the part is frozen from above
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("fails_at", [0, 1, 2, 9, 17])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(fails_at, error):
    for prepare in (lambda m: None, lambda m: inject(m, "v_proj", bias="all", train_also="head")):
        model = Net()
        prepare(model)
        before = snapshot(model)
        with Faults(fails_at, error), pytest.raises(error):
            inject(model, ["q_proj", "embed"], bias=report(model).bias or "none")
        assert changed_parts(before, snapshot(model)) == []


def test_an_error_while_freezing_leaves_the_model_as_it_was(monkeypatch):
    def failing(tensor):
        raise MemoryError("no")

    model = Net()
    before = snapshot(model)
    monkeypatch.setattr("lora_inject.core.adaptation.former_value", failing)
    with pytest.raises(MemoryError):
        inject(model, "q_proj", train_also="head")
    assert changed_parts(before, snapshot(model)) == []


def test_an_error_in_the_report_leaves_the_model_as_it_was(monkeypatch):
    model = Net()
    inject(model, "q_proj", r=1)
    before = snapshot(model)
    plan_module = importlib.import_module("lora_inject.plan")
    monkeypatch.setattr(plan_module, "report_of", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inject(model, "v_proj", r=1)
    assert changed_parts(before, snapshot(model)) == []
    monkeypatch.undo()
    strip(model)


def test_strip_refuses_when_the_class_was_swapped_again():
    model, _ = injected()
    nn.utils.parametrize.register_parametrization(model.layers[0].q_proj, "weight", nn.Identity())
    state = snapshot(model)
    with pytest.raises(LoRAInjectError, match="ParametrizedLoRALinear"):
        strip(model)
    assert snapshot(model) == state
    nn.utils.parametrize.remove_parametrizations(model.layers[0].q_proj, "weight")
    strip(model)


def test_distributed_wrappers_are_refused_before():
    with pytest.raises(UnsupportedLayerError, match="then wrap"):
        inject(nn.DataParallel(Net()), "q_proj")


def test_a_base_checkpoint_loads_into_an_adapted_model_missing_only_adapters():
    base, model = Net().state_dict(), Net()
    inject(model, "q_proj", r=2)
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert unexpected == []
    assert set(missing) == {f"layers.{i}.q_proj.lora_{part}" for i in (0, 1) for part in "AB"}
    assert torch.equal(model.head.weight, base["head.weight"])


def test_inference_mode_does_not_make_adapters_that_cannot_train():
    model = Net()
    with torch.inference_mode():
        inject(model, "q_proj", r=2)
    assert not model.layers[0].q_proj.lora_A.is_inference()
    train_steps(model, ids())


def test_inference_mode_makes_nothing_of_a_switch_that_cannot_train():
    model = Net()
    inject(model, "q_proj", r=2, bias="all")
    with torch.inference_mode():
        use(model)
        inject(model, "q_proj", r=2, alpha=6, adapter="more")
    layer = model.layers[0].q_proj
    made = [*model.parameters(), *(scale for _, scale in vars(layer)[SCALES].values())]
    assert made
    assert not any(tensor.is_inference() for tensor in made)


def test_a_parameter_that_came_after_inject_is_left_alone_by_strip():
    model = linears("a", "b")
    inject(model, "a", r=1)
    own = nn.Parameter(torch.zeros(1), requires_grad=False)
    model["b"].scale = own
    with pytest.warns(LoRAInjectWarning, match="scale came into the model"):
        strip(model)
    assert model["b"].scale is own
    assert not own.requires_grad
    assert model["b"].weight.requires_grad


def test_a_base_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = linears("a")
    with pytest.raises(UnsupportedLayerError, match="inference mode"):
        inject(model, "a")


def test_a_stripped_model_keeps_nothing_alive():
    model, _ = injected(train_also="head")
    reference = weakref.ref(model.layers[0].q_proj.lora_A)
    strip(model)
    gc.collect()
    assert reference() is None


def test_nothing_warns_in_the_ordinary_course():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = injected(bias="all", train_also="head", dropout=0.1)
        train_steps(model, ids())
        strip(model)


def test_buffers_that_come_and_grow_are_put_back():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("seen", torch.zeros(0))
            self.register_buffer("late", None)

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "cache": Cache()})
    before = snapshot(model)
    inject(model, "a", r=1, train_also="cache")
    model["cache"].seen = torch.ones(5)
    model["cache"].late = torch.ones(2)
    strip(model)
    assert [part for part in changed_parts(before, snapshot(model)) if part != "buffers"] == []


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_of_a_model_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))))
    flags = [p.requires_grad for p in model.parameters()]
    for targets in ("0", "all-linear"):
        inject(model, targets, r=1)
        strip(model)
        assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_do_not_train_in_place():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(nn.Linear(4, 4), scripted)
    before = [(p, p.requires_grad) for p in model.parameters()]
    for options in ({"train_also": "1"}, {"bias": "all"}):
        with pytest.raises(UnsupportedLayerError, match=r"1\.0: .*ScriptModule"):
            inject(model, "0", r=1, **options)
        assert [(p, p.requires_grad) for p in model.parameters()] == before
    inject(model, "0", r=1)
    with pytest.raises(UnsupportedLayerError, match=r"1\.0: .*ScriptModule"):
        freeze(model, train_also="1")
    strip(model)
    assert [(p, p.requires_grad) for p in model.parameters()] == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_copy_of_a_model_with_scripted_parts_is_stripped():
    scripted = torch.jit.script(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Sequential(traced))
    flags = [p.requires_grad for p in model.parameters()]
    inject(model, "re:0", r=1, train_also="2.0")
    again = copy.deepcopy(copy.deepcopy(model))
    assert report(again).trainable == report(model).trainable
    use(again)
    for each in (copy.deepcopy(again), again, model):
        assert each.get_parameter("2.0.0.weight").requires_grad is (each is model)
        strip(each)
        assert [p.requires_grad for p in each.parameters()] == flags


def test_reset_on_meta_says_that_there_is_nothing_to_set():
    with torch.device("meta"):
        model = linears("a")
    inject(model, "a", r=1)
    with pytest.raises(LoRAInjectError, match="to_empty"):
        reset_lora_parameters(model)


# Random module trees: Linears, Embeddings, norms and containers, some of them shared.

leaves = st.sampled_from(["linear", "plain", "norm", "batchnorm", "instancenorm", "conv1d"])
trees = st.recursive(leaves, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6)


def build(tree, shared):
    from transformers.pytorch_utils import Conv1D

    if isinstance(tree, list):
        return nn.Sequential(*(build(branch, shared) for branch in tree))
    makers = {
        "linear": lambda: nn.Linear(4, 4),
        "plain": lambda: nn.Linear(4, 4, bias=False),
        "norm": lambda: nn.LayerNorm(4),
        "batchnorm": lambda: nn.BatchNorm1d(4),
        "instancenorm": lambda: nn.Sequential(
            nn.Unflatten(0, (1, -1)),
            nn.InstanceNorm1d(6, affine=True, track_running_stats=True),  # of a batch of 6
            nn.Flatten(0, 1),
        ),
        "conv1d": lambda: Conv1D(4, 4),
    }
    if shared.draw(st.booleans()) and tree in shared.made:
        return shared.made[tree]
    shared.made[tree] = makers[tree]()
    return shared.made[tree]


class Shared:
    def __init__(self, data):
        self.made, self.draw = {}, data.draw


@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(data=st.data(), tree=trees)
def test_strip_restores_any_model_after_any_injection_and_training(data, tree):
    model = nn.Sequential(build(tree, Shared(data)), nn.Linear(4, 4), nn.Linear(4, 2))
    for module in model.modules():
        module.training = data.draw(st.booleans())
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    original, before = model, snapshot(model)  # kept, as a copy of a copy may take a free place
    arguments = {
        "targets": data.draw(st.sampled_from([["1"], "all-linear", nn.Linear])),
        "r": data.draw(st.integers(1, 5)),
        "alpha": data.draw(st.sampled_from([None, 1, 16.0])),
        "dropout": data.draw(st.sampled_from([0.0, 0.3])),
        "bias": data.draw(st.sampled_from(["none", "all", "lora_only"])),
        "train_also": data.draw(st.sampled_from([(), nn.LayerNorm, nn.BatchNorm1d, ["2"]])),
        "exclude": data.draw(st.sampled_from([(), "2", "0"])),
    }
    try:
        inject(model, **arguments)
    except LoRAInjectError:
        assert changed_parts(before, snapshot(model)) == []
        return
    x = torch.randn(6, 4)
    for action in data.draw(st.lists(st.sampled_from(["train", "copy", "eval"]), max_size=3)):
        if action == "train":
            model.train()
            train_steps(model, x, steps=2)
        elif action == "copy":
            model = copy.deepcopy(model)
        else:
            model.eval()(x)
    copied = model is not original
    strip(model)
    after = snapshot(model)
    identity = {"modules", "parameters", "buffers"} if copied else set()
    assert [part for part in changed_parts(before, after) if part not in identity] == []
    flags = [[flag for *_, flag in s["parameters"]] for s in (before, after)]
    assert flags[0] == flags[1]
