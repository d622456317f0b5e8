"""``allocate``: ranks that follow from statistics, within a budget, as ordinary targets."""

import pytest
import torch
from families import llama
from helpers import Net, ids
from torch import nn

from lora_inject import ArgumentError, allocate, calibrate, capacity, inject, plan
from lora_inject.core.state import adapters_of

pytestmark = [
    pytest.mark.cpu("ranks are numbers"),
    pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted"),
]


class Ladder(nn.Module):
    """Layers beside each other that read inputs of different spectra; two read the same."""

    def __init__(self, n=12):
        super().__init__()
        self.flat, self.steep, self.q, self.k = (nn.Linear(n, n) for _ in range(4))
        self.register_buffer("fall", 0.5 ** torch.arange(n))

    def forward(self, x):
        both = x * self.fall.sqrt()
        return self.flat(x) + self.steep(x * self.fall) + self.q(both) + self.k(both)


def statistics(model=None, n=12):
    torch.manual_seed(0)
    batches = [torch.randn(64, n) for _ in range(4)]
    return calibrate(model or Ladder(n), "all-linear", batches, progress=False)


def ranks(targets):
    return {path: values["r"] for path, values in targets.items()}


@pytest.mark.parametrize("r", [1, 2, 3, 5])
@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 4.0])
def test_the_budget_adds_up_and_equal_inputs_get_equal_ranks(r, rho):
    found = ranks(allocate(statistics(), r=r, rho=rho))
    assert found.get("q") == found.get("k")
    assert max(found.values()) <= int(rho * r)
    assert min(found.values()) >= 1
    left = 4 * r - sum(found.values())
    assert 0 <= left < 2  # less than what a pair of layers would take
    if rho == 1:
        assert found == dict.fromkeys(["flat", "steep", "q", "k"], r)


def test_the_largest_shares_of_all_layers_win():
    stats = statistics()
    units = [
        (float(share), path)
        for path in ("flat", "steep", "q", "k")
        for share in stats.inputs_of(path).shares(4)
    ]
    best = [path for _, path in sorted(units, reverse=True)[:8]]
    found = ranks(allocate(stats, r=2))
    assert {path: best.count(path) for path in set(best)} == found
    assert found.get("flat", 0) < found["steep"]


@pytest.mark.parametrize("alpha", [None, 5.0])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_every_layer_keeps_the_scaling(scaling, alpha):
    model, stats = Ladder(), statistics()
    targets = allocate(stats, r=3, alpha=alpha, scaling=scaling)
    assert len(set(ranks(targets).values())) > 1
    inject(model, targets)
    root = {"lora": 3, "rslora": 3**0.5}[scaling]
    for module in (model.flat, model.steep, model.q, model.k):
        for adapter in adapters_of(module):
            assert adapter.settings.scaling == pytest.approx((3 if alpha is None else alpha) / root)
            assert adapter.settings.r == ranks(targets)[adapter.path]


@pytest.mark.parametrize("parameters", [48, 100, 333, 500])
def test_parameters_are_not_exceeded(parameters):
    model, stats = Ladder(), statistics()
    targets = allocate(stats, parameters=parameters)
    used = plan(model, targets).parameters
    assert parameters - 2 * 48 < used <= parameters or used >= 4 * 24 * 4
    assert ranks(targets).get("q") == ranks(targets).get("k")


def test_bytes_are_not_exceeded_and_used():
    model = llama()
    batches = [{"input_ids": torch.randint(60, (4, 8))} for _ in range(3)]
    stats = calibrate(model, "all-linear", batches, progress=False)
    asked = {"batch": 2, "seq": 8}

    def total(targets):
        twin = llama()
        inject(twin, targets)
        return capacity(twin, **asked).total

    least, most = total(allocate(stats, r=1)), total(allocate(stats, r=4))
    middle = (least + most) // 2
    targets = allocate(stats, budget=middle, model=model, **asked)
    assert total(targets) <= middle
    mean = next(r for r in range(1, 9) if allocate(stats, r=r) == targets)
    assert total(allocate(stats, r=mean + 1)) > middle
    assert allocate(stats, budget="1TB", model=model, **asked) == allocate(stats, r=999)
    assert not any(adapters_of(module) for module in model.modules())
    with pytest.raises(ArgumentError, match=r"^budget: training takes"):
        allocate(stats, budget="1kB", model=model, **asked)
    plain = allocate(stats, budget=most, model=model, **asked)
    dora = allocate(stats, budget=most, model=model, adaptation={"variant": "dora"}, **asked)
    assert sum(ranks(dora).values()) < sum(ranks(plain).values())


def test_targets_select_their_layers_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "a*": nn.Linear(4, 4)})

        def forward(self, x):
            return self.inner["a*"](self.inner["proj"](self.proj(x)))

    model = Twice()
    stats = calibrate(model, ["proj", "inner.*"], [torch.randn(9, 4)], progress=False)
    for path in ("proj", "inner.proj", "inner.a*"):
        pattern = stats.layers[path].pattern
        assert [site.path for site in plan(model, pattern).sites] == [path]
    whole = nn.Linear(4, 4)
    stats = calibrate(whole, nn.Linear, [torch.randn(9, 4)], progress=False)
    assert [site.path for site in plan(whole, allocate(stats, r=1)).sites] == [""]


def test_no_layer_gets_more_than_its_inputs_vary_in():
    model = Net()
    stats = calibrate(model, ["q_proj", "o_proj"], [ids(1, 4)], progress=False)
    assert max(ranks(allocate(stats, r=50)).values()) == 3


def test_the_plan_shows_them():
    targets = allocate(statistics(), r=2)
    planned = plan(Ladder(), targets)
    assert {site.path: site.settings.r for site in planned.sites} == ranks(targets)
    shown = [line.split() for line in str(planned).splitlines()]
    for path, r in ranks(targets).items():
        assert any(path in line and str(r) in line for line in shown)


def test_statistics_that_tell_nothing_are_refused():
    stats = calibrate(nn.Linear(4, 4), nn.Linear, [torch.randn(1, 4)], progress=False)
    with pytest.raises(ArgumentError, match=r"^stats: they are of one vector"):
        allocate(stats)
    with pytest.raises(ArgumentError, match=r"^stats must be what calibrate returns"):
        allocate({})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"r": 2, "parameters": 9}, "^r, parameters and budget"),
     ({"rho": 0.5}, "^rho must"), ({"rho": "a"}, "^rho must"), ({"r": 0}, "^r must"),
     ({"scaling": "x"}, "^scaling must"), ({"alpha": -1}, "^alpha must"),
     ({"parameters": 3}, "^parameters=3 is not enough"), ({"parameters": 0}, "^parameters must"),
     ({"budget": "24 apples", "model": nn.Linear(2, 2)}, "^budget must"),
     ({"budget": "24GB"}, "^model: "), ({"seq": 3}, "^model, adaptation and what")],
)  # fmt: skip
def test_wrong_arguments_are_errors(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        allocate(statistics(), **arguments)
