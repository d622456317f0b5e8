"""Tied parameters: every place of the weight sees one adapter, counted once."""

import copy

import pytest
import torch
from families import gpt2
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot, train_steps
from torch import nn

from lora_inject import ArgumentError, UnsupportedLayerError, inject, plan, report, strip
from lora_inject.kinds.embedding import EmbeddingKind

pytestmark = pytest.mark.usefixtures("device")


def tied_net():
    model = Net()
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embed.weight
    return model


def merged_by_hand(model, delta):
    plain = strip(copy.deepcopy(model))
    with torch.no_grad():
        plain.embed.weight += delta
    return plain


@pytest.mark.parametrize("targets", ["embed", "head", ["embed", "head"], ["head", "embed"]])
def test_embedding_and_head_share_one_adapter(targets):
    model, x = tied_net().double(), ids()
    before, expected = snapshot(model), model(x)
    shown = inject(model, targets, r=2, alpha=3)
    assert torch.equal(model(x), expected)
    assert shown.trainable == 2 * (8 + 11)
    assert shown.patterns[0].layers == 1
    assert model.head.lora_A is model.embed.lora_A
    assert model.head.lora_B is model.embed.lora_B
    randomize_adapters(model)
    BA = model.embed.lora_B @ model.embed.lora_A
    leader = "head" if targets == "head" else "embed"
    delta = 1.5 * (BA if leader == "head" else BA.t())
    torch.testing.assert_close(model(x), merged_by_hand(model, delta.detach())(x))
    train_steps(model, x)
    twin = copy.deepcopy(model)
    assert twin.head.lora_A is twin.embed.lora_A
    strip(twin)
    strip(model)
    assert model.head.weight is model.embed.weight
    assert changed_parts(before, snapshot(model)) == []


def test_gradients_come_from_both_places():
    model, x = tied_net().double(), ids()
    inject(model, "embed", r=2)
    randomize_adapters(model)
    A, B = model.embed.lora_A, model.embed.lora_B
    assert torch.autograd.gradcheck(lambda *_: model(x), (A, B))


def test_excluding_a_place_leaves_it_with_the_plain_weight():
    model = tied_net()
    inject(model, "embed", r=2, exclude="head")
    assert type(model.head) is nn.Linear
    assert report(model).trainable == 2 * (8 + 11)


def test_the_plan_says_what_is_tied():
    shown = plan(tied_net(), "embed", r=2)
    assert [(site.path, site.follows) for site in shown.sites] == [("embed", ""), ("head", "embed")]
    assert shown.parameters == 2 * (8 + 11)
    assert "tied to embed" in str(shown)


def test_settings_of_tied_places_must_agree():
    with pytest.raises(ArgumentError, match="share one adapter"):
        plan(tied_net(), {"embed": {"r": 2}, "head": {"r": 3}})


def test_a_place_that_cannot_share_is_refused():
    model = tied_net()
    model.head.forward = model.head.forward
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=r"tied to weight of head.*Exclude head"):
        inject(model, "embed")
    assert snapshot(model) == before
    with pytest.raises(UnsupportedLayerError, match="trains in full"):
        inject(tied_net(), "embed", train_also="head")


def test_tied_plain_parameters():
    model = nn.Module()
    model.a, model.b = nn.Module(), nn.Module()
    model.a.pos = model.b.pos = nn.Parameter(torch.randn(4, 6))
    for targets in ("a.pos", "pos"):
        shown = inject(model, targets, r=2)
        assert shown.trainable == 2 * (4 + 6)
        randomize_adapters(model)
        assert torch.equal(model.a.pos, model.b.pos)
        strip(model)
        assert model.a.pos is model.b.pos


def test_tied_gpt2():
    model, inputs = gpt2().eval(), {"input_ids": torch.randint(3, 60, (2, 7))}
    assert model.lm_head.weight is model.transformer.wte.weight
    before, expected = snapshot(model), model(**inputs)[0]
    inject(model, ["wte", "c_attn"], r=2)
    assert torch.equal(model(**inputs)[0], expected)
    assert isinstance(model.transformer.wte.lora_adapters[0].kind, EmbeddingKind)
    train_steps(model, inputs)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_a_kernel_that_stands_in_no_layer_too_cannot_be_shared():
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3), "other": nn.Module()})
    model["other"].kernel = model["conv"].weight
    with pytest.raises(UnsupportedLayerError, match=r"kernel of other\.kernel.*tells no layout"):
        inject(model, "conv", r=1)
    inject(model, "conv", r=1, exclude="other")


def test_plain_parameters_are_tied_whatever_their_names():
    model = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
    model["a"].pos = model["b"].places = nn.Parameter(torch.randn(4, 6))
    inject(model, "a.pos", r=2)
    randomize_adapters(model)
    assert torch.equal(model["a"].pos, model["b"].places)
    assert not torch.equal(model["a"].pos, model["a"]._parameters["pos"])


def test_a_layer_that_is_adapted_in_parts_shares_nothing():
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12), "other": nn.Linear(4, 12)})
    model["other"].weight = model["qkv"].weight
    with pytest.raises(UnsupportedLayerError, match=r"weight of other.*adapted in parts"):
        inject(model, "qkv", r=1, parts={"qkv": ("q", "k", "v")})


def test_a_layer_of_several_weights_follows_with_one_of_them_and_leads_with_none():
    for first in ("lin", "lstm"):
        layers = {"lin": nn.Linear(4, 16, bias=False), "lstm": nn.LSTM(4, 4)}
        model = nn.ModuleDict({first: layers[first], **layers})
        model["lstm"].weight_ih_l0 = model["lin"].weight
        for targets in ("lstm", ["lin", "lstm"]):
            with pytest.raises(UnsupportedLayerError, match=r"^lstm: .* is lin\.weight too"):
                plan(model, targets, r=1)
        assert [site.path for site in plan(model, "lstm", r=1, exclude="lin").sites] == ["lstm"]
        inject(model, "lin", r=1)
        randomize_adapters(model)
        assert torch.equal(model["lstm"].weight_ih_l0, model["lin"].lora_B @ model["lin"].lora_A
                           + model["lin"].weight)  # fmt: skip


def test_a_weight_of_no_known_layer_follows_and_a_buffer_stays():
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "other": nn.Module(), "buffer": nn.Module()})
    model["other"].weight = model["lin"].weight
    model["buffer"].register_buffer("weight", model["lin"].weight)
    inject(model, "lin", r=1)
    randomize_adapters(model)
    W = model["lin"].weight
    assert torch.equal(model["other"].weight, W + model["lin"].lora_B @ model["lin"].lora_A)
    assert model["buffer"].weight is W


def test_the_rows_of_a_tied_weight_are_scaled_in_it_whatever_its_layers_do():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * (x @ self.weight.t())

    model = nn.ModuleDict({"a": Doubled(4, 4), "b": Doubled(4, 4)})
    model["b"].weight = model["a"].weight
    assert len(plan(model, "a", r=1, variant="dora", how="weight").sites) == 2
