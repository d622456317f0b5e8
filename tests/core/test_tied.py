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
