"""Buffers that a forward moves and that belong to no norm: held while frozen, saved if trained."""

import copy

import pytest
import torch
from helpers import changed_parts, snapshot, train_steps
from torch import nn

from lora_inject import inject, load, save, strip
from lora_inject.changes.moving import moving_buffers
from lora_inject.changes.statistics import is_held

pytestmark = pytest.mark.usefixtures("device")


class Average(nn.Module):
    """An exponential average and a counter; a cache and a table that no forward writes to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def update(self, x):
        self.average.lerp_(x.mean(0), 0.1)
        self.steps += 1

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.update(x)
        return self.weight * (x - self.average)


def nudge(codes, x):
    codes.add_(x.mean(0))


class Codes(nn.Module):
    """Vector quantisation, whose codes a function moves."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("codes", torch.arange(12.0).view(3, 4))
        self.register_buffer("used", torch.zeros(3))

    def forward(self, x):
        nearest = torch.cdist(x, self.codes).argmin(-1)
        if self.training:
            nudge(self.codes.data, x.detach())
            self.used[nearest] = 1.0
        return self.weight * x + (self.codes[nearest] - x).detach()


class Table(nn.Module):
    """What only reads its buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.ones(4))

    def forward(self, x):
        y = x + self.places.to(x.dtype)
        y[0] = self.places.sum()
        return y


def normed():
    return nn.utils.spectral_norm(nn.Linear(4, 4))


def observed():
    return torch.ao.quantization.FakeQuantize(
        observer=torch.ao.quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
    )


MOVE = {"average": Average, "codes": Codes, "spectral norm": normed, "observer": observed}


def values(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("name", MOVE)
def test_what_moves_stands_still_while_frozen_and_moves_again_after_strip(name):
    model = nn.Sequential(nn.Linear(4, 4), MOVE[name](), nn.Linear(4, 2)).train()
    x = torch.randn(6, 4)
    model(x)  # an observer has to have seen something
    before = snapshot(model)
    buffers = dict(model[1].named_buffers())
    first = {key: value.clone() for key, value in buffers.items()}
    inject(model, "2", r=2)
    train_steps(model, x)
    assert same(first, dict(model[1].named_buffers()))
    strip(model)
    assert changed_parts(before, snapshot(model)) in ([], ["gradients"])
    model(2 * x)
    assert not same(first, dict(model[1].named_buffers()))


@pytest.mark.parametrize("make", [Average, Codes])
def test_what_an_adapter_trains_moves_and_is_saved(make, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(4, 2)).train()
    base, x = copy.deepcopy(model), torch.randn(6, 4)
    inject(model, "2", r=2, train_also="1")
    train_steps(model, x)
    assert not same(values(base[1]), values(model[1]))
    save(model, tmp_path)
    trained = values(model[1])
    load(base, tmp_path)
    assert same(trained, values(base[1]))


def test_what_is_only_read_is_left_alone():
    assert moving_buffers(Table()) == ()
    assert moving_buffers(Average()) == ("average", "steps")
    model = nn.Sequential(nn.Linear(4, 4), Table())
    inject(model, "0", r=2)
    assert not is_held(model[1])


@pytest.mark.parametrize("affine", [True, False])
def test_norms_that_were_converted_between_move_again_after_strip(affine):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=affine))
    inject(model, "0", r=2)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    strip(model)
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert model[1].track_running_stats
    assert all(p.requires_grad for p in model.parameters())
