"""One test for each defect that a review found in an early version, so that none comes back."""

import importlib

import pytest
import torch
from helpers import (
    Faults,
    Net,
    changed_parts,
    ids,
    randomize_adapters,
    snapshot,
    train_steps,
    trainable_names,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    LoRALayer,
    NoMatchError,
    UnsupportedLayerError,
    freeze,
    inject,
    plan,
    report,
    reset_lora_parameters,
    strip,
)

pytestmark = pytest.mark.usefixtures("device")


def linears(*names):
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})


def test_attributes_of_the_layer_are_not_hidden():
    class Gated(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.kind, self.adapters, self.settings = "relu", nn.Identity(), 3

        def forward(self, x):
            y = super().forward(x)
            return self.adapters(y).relu() if self.kind == "relu" else y

    model, x = nn.Sequential(Gated()), torch.randn(3, 4)
    expected = model(x)
    inject(model, "0", r=1)
    assert torch.equal(model(x), expected)
    clash = nn.Sequential(nn.Linear(4, 4))
    clash[0].lora_adapters = 3
    with pytest.raises(UnsupportedLayerError, match="lora_adapters"):
        inject(clash, "0")


def test_strip_changes_nothing_when_it_cannot_finish():
    model = linears("a", "head")
    inject(model, "a", r=1, train_also="head")
    model["head"].weight = nn.Parameter(torch.randn(6, 4))
    state = snapshot(model)
    with pytest.raises(LoRAInjectError, match=r"\(4, 4\).*\(6, 4\)"):
        strip(model)
    assert snapshot(model) == state


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


def test_a_base_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = linears("a")
    with pytest.raises(UnsupportedLayerError, match="inference mode"):
        inject(model, "a")


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


def test_train_also_does_not_take_a_parameter_for_a_module():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model.token = nn.Parameter(torch.zeros(1, 4))
    for argument in ("train_also", "exclude"):
        with pytest.raises(NoMatchError, match="names a parameter"):
            inject(model, "fc", **{argument: "token"})


class OwnForward(nn.BatchNorm1d):
    def forward(self, x):
        if self.training:
            self.running_mean += 0.1 * (x.mean(0) - self.running_mean).detach()
        return x - self.running_mean


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("moving_mean", torch.zeros(4))

    def forward(self, x, depth=2):
        if self.training:
            self.moving_mean += 1
        return self(x, depth - 1) if depth else self.scale * x


@pytest.mark.parametrize(
    "make",
    [lambda: OwnForward(4), Recursive, lambda: parametrizations.spectral_norm(nn.Linear(4, 4))],
)
def test_statistics_stand_still_however_they_move(make):
    model = nn.Sequential(nn.Linear(4, 4), make())
    before = snapshot(model)
    inject(model, "0", r=1)
    buffers = [b.clone() for b in model.buffers()]
    train_steps(model.train(), torch.randn(5, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_an_infinite_activation_does_not_reach_statistics_that_stand_still():
    model = nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(3, track_running_stats=True))
    inject(model, "0", r=1)
    model.train()(torch.full((2, 3, 4), float("inf")))
    assert all(torch.isfinite(b).all() for b in model.buffers())


def test_a_large_scaling_does_not_overflow_in_half_precision():
    model, x = nn.Linear(64, 64, dtype=torch.float16), (torch.randn(4, 64) * 3000).half()
    expected = model(x)
    inject(model, nn.Linear, r=8, alpha=512)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("at", range(0, 24, 3))
def test_a_failed_inject_gives_back_statistics_and_gradients(at):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), OwnForward(4))
    model[0].weight.grad = gradient = torch.ones(4, 4)
    before = snapshot(model)
    with Faults(at), pytest.raises(RuntimeError, match="no"):
        inject(model, "0")
    assert changed_parts(before, snapshot(model)) == []
    assert model[1].track_running_stats
    assert model[0].weight.grad is gradient


def test_an_error_in_the_report_leaves_the_model_as_it_was(monkeypatch):
    model = Net()
    inject(model, "q_proj", r=1)
    before = snapshot(model)
    plan_module = importlib.import_module("lora_inject.plan")
    monkeypatch.setattr(plan_module, "report_of", lambda look: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        inject(model, "v_proj", r=1)
    assert changed_parts(before, snapshot(model)) == []
    monkeypatch.undo()
    strip(model)


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


def test_a_glob_in_train_also_passes_over_what_cannot_train():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
    inject(model, "a", train_also="head*", r=1)
    assert {"head.0.weight", "head.0.bias"} <= trainable_names(model)


def test_reset_on_meta_says_that_there_is_nothing_to_set():
    with torch.device("meta"):
        model = linears("a")
    inject(model, "a", r=1)
    with pytest.raises(LoRAInjectError, match="to_empty"):
        reset_lora_parameters(model)


def test_layers_by_number_where_numbers_are_not_contiguous():
    model = nn.ModuleDict({"10": nn.Linear(4, 4), "20": nn.Linear(4, 4)})
    assert [site.path for site in plan(model, nn.Linear, layers=-1).sites] == ["20"]
    assert [site.path for site in plan(model, nn.Linear, layers=10).sites] == ["10"]
    with pytest.raises(ArgumentError, match=r"layers=\[8\]"):
        plan(model, nn.Linear, layers=8)


def test_integer_parameters_cost_no_training_memory():
    model = linears("a")
    before = report(model).memory.full.total
    model.index = nn.Parameter(torch.arange(1000), requires_grad=False)
    assert report(model).memory.full.total == before


def test_freeze_alone_holds_once_and_lets_go():
    model = nn.ModuleDict({"bn": nn.BatchNorm1d(4), "own": Recursive(), "a": nn.Linear(4, 4)})
    freeze(model)
    freeze(model)
    assert len(model["own"]._forward_pre_hooks) == 1
    inject(model, "a", r=1, train_also=["bn", "own"])
    model["bn"](torch.randn(3, 4))
    model["own"](torch.randn(3, 4))
    assert model["bn"].num_batches_tracked == 1
    assert model["own"].moving_mean.any()


def test_biases_that_had_been_frozen_are_mentioned():
    model = linears("a", "b").requires_grad_(False)
    shown = inject(model, "a", r=1, bias="all")
    assert "2 bias parameters had been frozen before" in shown.notes[0]


@pytest.mark.parametrize(
    "arguments", [{"layers": [[0]]}, {"alpha": 10**400}, {"r": 10**30}, {"r": 2**31}]
)
def test_absurd_values_are_refused_by_name(arguments):
    with pytest.raises(ArgumentError, match=f"^{next(iter(arguments))}"):
        plan(Net(), "q_proj", **arguments)


@pytest.mark.parametrize("empty", [(), [], set(), frozenset(), None])
def test_optional_patterns_may_be_empty(empty):
    assert plan(Net(), "q_proj", exclude=empty, train_also=empty).sites


def test_a_method_of_another_meaning_is_not_asked_for_the_head():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def get_output_embeddings(self, which):
            return which

    assert plan(Odd(), "all-linear").sites


def test_paths_with_braces_in_them():
    model = nn.ModuleDict({"{}": nn.Linear(4, 4), "3": nn.Linear(4, 4)})
    text = str(plan(model, nn.Linear))
    assert "{}" in text
    assert " 3 " in text


def test_heads_of_other_families():
    import transformers as tf

    config = tf.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=24,
    )  # fmt: skip
    model = tf.BertForPreTraining(config)
    assert not any(site.path.startswith("cls.") for site in plan(model, "all-linear").sites)


def test_the_adapted_layers_of_a_copy_are_those_of_the_copy():
    import copy

    model = Net()
    inject(model, "q_proj", r=1)
    twin = copy.deepcopy(model)
    randomize_adapters(twin)
    x = ids()
    assert not torch.equal(model(x), twin(x))
    strip(twin)
    assert type(model.layers[0].q_proj).__name__ == "LoRALinear"


# A second review, of every kind of layer.


class Parent(nn.Module):
    """Reads the weight of one child, asks facts of another, and calls a third."""

    def __init__(self):
        super().__init__()
        self.read, self.asked, self.called = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        if isinstance(self.asked.weight, torch.Tensor) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        return self.called(self.asked(x))


def test_a_weight_that_a_parent_reads_is_found_in_its_code():
    model, x = nn.Sequential(Parent()), torch.randn(2, 4)
    ways = {site.path: site.way for site in plan(model).sites}
    assert ways == {"0.read": "weight", "0.asked": "branch", "0.called": "branch"}
    inject(model, r=1)
    randomize_adapters(model)
    model(x).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_a_grandparent_reads_too():
    class Grandparent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})
            self.block = Parent()

        def forward(self, x):
            return [self.block.called.weight @ row for row in x]

    ways = {site.path: site.way for site in plan(Grandparent()).sites}
    assert ways["block.called"] == "weight"
    assert ways["inner.proj"] == "branch"


def test_wavlm_trains_its_projections():
    import transformers as tf

    config = tf.WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = tf.WavLMModel(config).eval()
    inject(model, ["q_proj", "v_proj"], r=2)
    model(torch.randn(1, 400))[0].sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_recurrent_layers_with_normed_weights_are_refused():
    normed = parametrizations.weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
    pruned = nn.LSTMCell(4, 4)
    prune.l1_unstructured(pruned, "weight_hh", 0.5)
    for layer in (normed, pruned):
        with pytest.raises(UnsupportedLayerError, match="normed, pruned"):
            inject(nn.Sequential(layer), "0")


def test_attention_with_a_pruned_weight_is_refused_and_left_by_all_linear():
    attention = nn.MultiheadAttention(4, 2)
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    model = nn.ModuleDict({"attention": attention, "up": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedLayerError, match="normed, pruned"):
        inject(model, "attention")
    assert "attention" in {skip.path for skip in plan(model).skipped if skip.wanted}


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(5, 4, 3, stride=1, dilation=3, output_padding=2),
        nn.ConvTranspose2d(5, 4, 3, stride=2, dilation=3, output_padding=2),
    ],
)
def test_an_output_padding_as_large_as_the_stride(layer):
    x = torch.randn(2, 5, *(6,) * len(layer.kernel_size))
    expected = layer.to(x.device)(x)
    inject(layer, type(layer), r=2)
    assert torch.equal(layer(x), expected)


def test_convolutions_that_change_their_weight():
    class Masked(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight * torch.eye(weight.shape[-1]), bias)

    class Writing(nn.Conv2d):
        def forward(self, x):
            self.weight.data *= 0.5
            return super().forward(x)

    assert plan(Masked(2, 2, 3), nn.Conv2d, r=1).sites[0].way == "weight"
    with pytest.raises(UnsupportedLayerError, match="writes to its weight"):
        inject(nn.Sequential(Writing(2, 2, 3)), "0")


def test_an_embedding_that_sometimes_reads_its_weight():
    class Soft(nn.Embedding):
        def forward(self, x):
            return x @ self.weight if x.is_floating_point() else super().forward(x)

    with pytest.raises(UnsupportedLayerError, match="does not always call"):
        inject(Soft(4, 4), nn.Embedding)
    with pytest.raises(UnsupportedLayerError, match="sparse=True"):
        inject(nn.Embedding(4, 4, sparse=True), nn.Embedding, how="weight")


def test_subclasses_with_another_forward_are_refused():
    class OddLSTM(nn.LSTM):
        def forward(self, x):
            return torch.tanh(x @ self.weight_ih_l0.T)

    class OddAttention(nn.MultiheadAttention):
        def forward(self, x):
            return x

    for layer in (OddLSTM(4, 4), OddAttention(4, 2)):
        with pytest.raises(UnsupportedLayerError, match="has a forward"):
            inject(nn.Sequential(layer), "0")


def test_a_layer_that_returns_no_tensor_says_so():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model = nn.ModuleDict({"pair": Pair(4, 4)})
    inject(model, "pair", r=1)
    with pytest.raises(LoRAInjectError, match=r"^pair: its forward returned a tuple"):
        model["pair"](torch.randn(2, 4))


def test_the_first_argument_is_found_by_its_name():
    class Scaling(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    layer, x = Scaling(4, 4), torch.randn(2, 4)
    inject(layer, nn.Linear, r=1)
    randomize_adapters(layer)
    assert torch.equal(layer(scale=2.0, x=x), layer(x, scale=2.0))


def test_fused_weights_have_the_operators_of_a_tensor():
    layer = nn.Module()
    layer.w = nn.Parameter(torch.randn(2, 3, 4))
    inject(layer, "w", r=1, layout="out_in")
    randomize_adapters(layer)
    whole = torch.stack([layer.w[0], layer.w[1]])
    for ours, theirs in [
        (layer.w * 2, whole * 2), (2 * layer.w, 2 * whole), (layer.w + 1, whole + 1),
        (1 - layer.w, 1 - whole), (layer.w / 2, whole / 2), (-layer.w, -whole),
        (layer.w**2, whole**2), (layer.w > 0, whole > 0),
    ]:  # fmt: skip
        assert torch.equal(ours, theirs)


def test_biases_of_experts_are_no_matrices_to_adapt():
    experts = nn.Module()
    experts.is_transposed = True
    experts.up_proj = nn.Parameter(torch.randn(2, 4, 6))
    experts.up_proj_bias = nn.Parameter(torch.zeros(2, 6))
    model = nn.ModuleDict({"experts": experts})
    assert [site.path for site in plan(model, "experts.*").sites] == ["experts.up_proj"]
