"""Statistics of frozen layers stand still, however they move, and come back."""

import pytest
import torch
from helpers import Faults, changed_parts, snapshot, train_steps
from torch import nn
from torch.nn.utils import parametrizations

from lora_inject import freeze, inject, plan, strip

pytestmark = pytest.mark.usefixtures("device")


class Custom(nn.Module):
    """BatchNorm-like, with a momentum of the other convention and in-place updates."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
            self.num_batches_tracked += 1
        return self.scale * (x - self.running_mean)


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm1d without momentum": lambda: nn.BatchNorm1d(4, momentum=None),
    "BatchNorm2d": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 1, 1)), nn.BatchNorm2d(4), nn.Flatten()
    ),
    "InstanceNorm1d": lambda: nn.Sequential(
        nn.Unflatten(0, (2, -1)),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        nn.Flatten(0, 1),
    ),
    "custom": Custom,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_frozen_statistics_stand_still_and_normalise_as_before(norm, bias):
    model = nn.Sequential(nn.Linear(4, 4), NORMS[norm](), nn.Linear(4, 2)).train()
    x = torch.randn(6, 4)
    before, buffers = snapshot(model), [b.clone() for b in model.buffers()]
    if norm != "custom":  # whose first forward uses statistics that it has moved
        expected = model(x)
        for buffer, former in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(former)
    shown = inject(model, "0", r=2, bias=bias)
    if norm != "custom":
        assert torch.equal(model(x), expected)
    train_steps(model, x)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert "1 normalisation layer stand" in shown.notes[0]
    model.eval()(x)
    strip(model)
    assert snapshot(model) == before
    model.train()(x)
    assert not all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))


def test_statistics_of_what_trains_in_full_move_and_come_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = snapshot(model)
    inject(model, "0", r=2, train_also="1")
    train_steps(model, torch.randn(6, 4))
    assert model[1].num_batches_tracked == 3
    strip(model)
    assert snapshot(model) == before


def test_freeze_releases_statistics_of_what_is_to_train():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Custom())
    before = snapshot(model)
    inject(model, "0", r=2)
    freeze(model, train_also=["1", "2"])
    model(torch.randn(6, 4))
    assert model[1].num_batches_tracked == 1
    assert model[2].num_batches_tracked == 1
    strip(model)
    assert snapshot(model) == before


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("made", ["scripted", "traced", "inside a scripted one"])
def test_statistics_of_scripted_parts_stand_still(made):
    stem = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    x = torch.randn(2, 1, 9, requires_grad=True)
    if made == "inside a scripted one":
        stem = nn.Sequential(stem, nn.Identity())
    stem = torch.jit.trace(stem, (x,)) if made == "traced" else torch.jit.script(stem)
    model = nn.ModuleDict({"vad": stem, "asr": nn.Linear(4, 4)}).train()
    plan(model, "asr", r=2)
    before = {key: value.clone() for key, value in stem.state_dict().items()}
    inject(model, "asr", r=2)
    for _ in range(2):
        stem(x).sum().backward()
    assert all(torch.equal(stem.state_dict()[key], value) for key, value in before.items())
    assert x.grad is not None
    strip(model)
    stem(x)
    moved = [k for k, value in before.items() if not torch.equal(stem.state_dict()[k], value)]
    assert any("running_mean" in key for key in moved)


class Interrupted(Custom):
    """One that is interrupted after it has moved its statistics; it calls itself before, too."""

    def forward(self, x):
        y = super().forward(x)
        if x.shape[0] == 1:
            raise KeyboardInterrupt
        return y if x.shape[0] == 2 else y + self(x[:2]).mean()


@pytest.mark.parametrize("then", [strip, lambda model: model(torch.randn(5, 4))])
def test_what_is_interrupted_moves_nothing_either(then):
    model = nn.Sequential(nn.Linear(4, 4), Interrupted()).train()
    buffers = [(b, b.clone()) for b in model.buffers()]
    inject(model, "0", r=2)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(1, 4))
    then(model)
    for now, (own, value) in zip(model.buffers(), buffers, strict=True):
        assert now is own
        assert torch.equal(own, value)
    model(torch.randn(5, 4))
    moved = [not torch.equal(own, value) for own, value in buffers]
    assert moved == [then is strip] * 2


def test_statistics_that_come_later_stand_still_from_the_next_call_on():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    inject(model, "0", r=2)
    norm = model[1]
    norm.running_mean, norm.running_var = torch.zeros(4), torch.ones(4)
    norm.num_batches_tracked, norm.track_running_stats = torch.tensor(0), True
    freeze(model)
    model.train()(torch.randn(8, 4))
    assert torch.equal(norm.running_mean, torch.zeros(4))
    strip(model)
    model(torch.randn(8, 4))
    assert not torch.equal(norm.running_mean, torch.zeros(4))
