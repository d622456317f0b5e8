"""Layers with a forward of their own: tried out, and adapted where that is right or not at all."""

import copy

import pytest
import torch
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn
from torch.nn import functional as F

from lora_inject import (
    NoMatchError,
    UnsupportedLayerError,
    inject,
    merge,
    plan,
    strip,
    unmerge,
)
from lora_inject.kinds import trials

pytestmark = pytest.mark.usefixtures("device")
N = 6


class Masked(nn.Linear):
    """As in MADE; the mask comes later than the layer."""

    def __init__(self):
        super().__init__(N, N)
        self.register_buffer("mask", torch.ones(N, N))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class OfBits(nn.Linear):
    """A mask that is no buffer, and is asked for by a method."""

    def __init__(self):
        super().__init__(N, N)
        self.kept = torch.ones(N, N, dtype=torch.bool)

    def weights(self):
        return self.weight.masked_fill(~self.kept, 0)

    def forward(self, x):
        return F.linear(x, self.weights(), self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Standardised(nn.Linear):
    def forward(self, x):
        W = self.weight
        return F.linear(x, (W - W.mean(1, keepdim=True)) / W.std(1, keepdim=True), self.bias)


class Gated(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias).relu()


class Scaled(nn.Linear):
    """Its product is that of ``super().forward``."""

    def forward(self, x):
        return 3 * super().forward(x + 1)


class Plain(nn.Linear):
    """A way of its own to the same."""

    def forward(self, hidden_states):
        y = hidden_states @ self.weight.T
        return y if self.bias is None else y + self.bias


class Conv1D(nn.Module):
    """Has a name that is known, and a forward that is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N))

    def forward(self, x):
        return x @ self.weight.tanh()


WAYS = {
    Masked: "weight", OfBits: "weight", Cosine: "weight", Standardised: "weight",
    Gated: "weight", Scaled: "branch", Plain: "branch",
}  # fmt: skip


def build(cls):
    return cls() if cls in (Masked, OfBits, Conv1D) else cls(N, N)


@pytest.mark.parametrize("cls", [*WAYS, Conv1D])
def test_a_layer_computes_what_it_would_with_another_weight(cls):
    model = nn.Sequential(build(cls)).double()
    if cls is Masked:
        model[0].mask.tril_(-1)
    before, x = snapshot(model), torch.randn(5, N, dtype=torch.float64)
    base = model(x)
    (site,) = plan(model, r=2).sites
    assert site.way == WAYS.get(cls, "weight")
    inject(model, r=2, alpha=3)
    assert torch.equal(model(x), base)
    randomize_adapters(model)
    A, B = model[0].lora_A.detach(), model[0].lora_B.detach()
    BA = (B @ A).T if cls is Conv1D else B @ A
    other = strip(copy.deepcopy(model))
    with torch.no_grad():
        other[0].weight += 1.5 * BA
    torch.testing.assert_close(model(x), other(x))
    merge(model)
    torch.testing.assert_close(model(x), other(x))
    unmerge(model)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_a_masked_flow_stays_autoregressive():
    model = nn.Sequential(Masked(), nn.Tanh(), Masked())
    model[0].mask.tril_(-1)
    inject(model, r=2)
    model[2].mask.tril_(-1)  # set after
    randomize_adapters(model)
    J = torch.autograd.functional.jacobian(model, torch.randn(N))
    assert J.tril(-1).any()
    assert not J.triu().any()


def test_dropout_stands_below_a_forward_that_calls_its_parents():
    model, x = nn.Sequential(Scaled(N, N)), torch.ones(400, N)
    inject(model, "0", r=2, dropout=0.5)
    base = model.eval()(x)
    randomize_adapters(model)
    full, seen = model(x) - base, model.train()(x) - base
    assert seen.std(0).min() > 0
    torch.testing.assert_close(seen.mean(0), full[0], rtol=0.5, atol=0.5)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(2, -1)


class Grouped(nn.Linear):
    """Two groups, each with half of the weight."""

    def forward(self, x):
        W = self.weight.view(2, -1, N).transpose(1, 2)
        return torch.bmm(x.reshape(-1, 2, N).transpose(0, 1), W).transpose(0, 1)


class Narrowing(nn.Linear):
    def forward(self, x):
        return super().forward(x)[..., :1]


NO_MAPS = {Router: "returns a topk", Grouped: "", Narrowing: "makes"}


@pytest.mark.parametrize("cls", NO_MAPS)
def test_what_maps_nothing_is_left_alone_and_refused_when_named(cls):
    model = nn.ModuleDict({"odd": cls(N, N), "plain": nn.Linear(N, N)})
    shown = plan(model, r=2)
    assert [site.path for site in shown.sites] == ["plain"]
    assert [skip.path for skip in shown.skipped] == ["odd"]
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=f"^odd: {cls.__name__} .*{NO_MAPS[cls]}") as e:
        inject(model, "odd", r=2)
    assert 'how="weight"' in str(e.value)
    assert changed_parts(before, snapshot(model)) == []
    (note,) = [n for n in inject(model, r=2).notes if "odd" in n]
    assert note.startswith("Not adapted: odd")
    strip(model)
    inject(model, "odd", r=2, how="weight")
    randomize_adapters(model)
    layer, other = model["odd"], strip(copy.deepcopy(model))["odd"]
    with torch.no_grad():
        other.weight += (layer.lora_B @ layer.lora_A).detach()
    x = torch.randn(4, 2, N)
    for one, two in zip(layer(x), other(x), strict=True):
        torch.testing.assert_close(one, two)


class MaskedInPlace(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(torch.ones_like(self.weight).tril())
        return super().forward(x)


class MaxNormed(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


class MaskedConv(nn.Conv2d):
    def __init__(self, *_):
        super().__init__(N, N, 3)

    def forward(self, x):
        with torch.no_grad():
            self.weight[:, :, 1:].zero_()
        return super().forward(x)


class NormedEmbedding(nn.Embedding):
    def forward(self, ids):
        with torch.no_grad():
            self.weight.div_(self.weight.norm())
        return super().forward(ids)


@pytest.mark.parametrize("cls", [MaskedInPlace, MaxNormed, MaskedConv, NormedEmbedding])
@pytest.mark.parametrize("how", ["auto", "weight"])
def test_a_layer_that_writes_to_its_weight_is_refused(cls, how):
    model = nn.Sequential(cls(N, N), nn.Linear(N, N))
    before = snapshot(model)
    wanted = "how=" if cls is NormedEmbedding and how == "auto" else "writes to its weight"
    with pytest.raises(UnsupportedLayerError, match=f"^0: .*{wanted}"):
        inject(model, "0", r=2, how=how)
    assert changed_parts(before, snapshot(model)) == []


def test_a_trial_changes_neither_layer_nor_random_numbers():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(N, N)
            self.seen, self.inner = [], nn.BatchNorm1d(N)

        def forward(self, x):
            self.seen.append(len(x))
            self.calls = len(self.seen)
            return self.inner(super().forward(F.dropout(x)).flatten(0, -2)).view(x.shape)

    model = nn.Sequential(Counting())
    before, numbers = snapshot(model), torch.get_rng_state()
    plan(model, "0", r=2)
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model[0].seen == []


def test_layers_alike_are_tried_once_and_known_ones_never(monkeypatch):
    tried = []
    monkeypatch.setattr(trials, "_copy", lambda m, own=trials._copy: tried.append(m) or own(m))

    class Fresh(Plain):
        pass

    model = nn.Sequential(*(Fresh(N, N) for _ in range(5)), Fresh(N, N + 1), nn.Linear(N, N))
    inject(model, r=2)
    strip(model)
    inject(model, r=2)
    assert len(tried) == 2


def test_a_layer_without_values_is_tried_with_some():
    with torch.device("meta"):
        model = nn.Sequential(Masked(), Plain(N, N))
    assert [site.way for site in plan(model, r=2).sites] == ["weight", "branch"]


def test_a_mask_beside_a_weight_is_no_packed_weight():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = N
            self.weight = nn.Parameter(torch.randn(N, N))
            self.register_buffer("weight_mask", torch.ones(N, N, dtype=torch.uint8))

        def forward(self, x):
            return F.linear(x, self.weight * self.weight_mask)

    model = nn.ModuleDict({"other": Other()})
    with pytest.raises(NoMatchError, match=r"other\.weight"):
        inject(model, "other", r=2)
    inject(model, "other.weight", r=2)


@pytest.mark.parametrize("layer", [
    nn.Linear(8, 4), nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(5, 8, 3), nn.Embedding(8, 4),
    nn.Conv2d(8, 6, 3, groups=2),
])  # fmt: skip
def test_a_layer_whose_weight_was_cut_is_adapted_as_it_is(layer):
    dim = 0 if isinstance(layer, nn.Embedding) else 1
    size = 2 if getattr(layer, "groups", 1) == 2 else 5
    layer.weight = nn.Parameter(layer.weight.detach().narrow(dim, 0, size).clone())
    if layer.__class__ is nn.ConvTranspose2d:
        layer.bias = nn.Parameter(layer.bias.detach()[:5].clone())
    n = 4 if getattr(layer, "groups", 1) == 2 else 5
    x = torch.randn(2, n, *(6,) * (layer.weight.dim() - 2))
    x = torch.tensor([0, 4]) if isinstance(layer, nn.Embedding) else x
    model = nn.Sequential(layer)
    base, before = model(x), snapshot(model)
    inject(model, "0", r=2)
    assert torch.equal(model(x), base)
    randomize_adapters(model)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_a_layer_that_cannot_be_copied_is_left_alone():
    class Single(nn.Linear):
        made = 0

        def __new__(cls, *args):
            cls.made += 1
            if cls.made > 1:
                raise RuntimeError("there is one of these")
            return super().__new__(cls)

        def forward(self, x):
            return x @ self.weight.T

    model = nn.Sequential(Single(N, N))
    with pytest.raises(UnsupportedLayerError, match=r"^0: .*there is one of these"):
        inject(model, "0", r=2)
