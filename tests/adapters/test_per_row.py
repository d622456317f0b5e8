"""per_row: a different adapter for each row of a batch, against running each row alone."""

import copy

import pytest
import torch
from families import FAMILIES
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lora_inject.adapters.rows as rows_of_layers
from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    UnsupportedLayerError,
    disabled,
    inject,
    merge,
    merged,
    per_row,
    plan,
    remove,
    strip,
    unmerge,
    use,
)

pytestmark = pytest.mark.usefixtures("device")

ROWS = ["fr", None, "de", "fr", "es"]

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda n: torch.randn(n, 6)),
    "linear 3d": (lambda: nn.Linear(6, 4), lambda n: torch.randn(n, 3, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), lambda n: torch.randint(9, (n, 7))),
    "embedding 1d": (lambda: nn.Embedding(9, 4), lambda n: torch.randint(9, (n,))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda n: torch.randn(n, 4, 8)),
    "conv2d groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2),
        lambda n: torch.randn(n, 4, 7, 7),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2),
        lambda n: torch.randn(n, 4, 5, 5),
    ),
}


def with_adapters(base, targets, **other):
    """Adapters of different ranks and scalings, all with values."""
    model = nn.ModuleList([base])
    inject(model, targets, r=2, alpha=3, adapter="fr", **other)
    inject(model, targets, r=4, adapter="de", **other)
    inject(model, targets, r=1, alpha=0.5, adapter="es", **other)
    randomize_adapters(model, names=["fr", "de", "es"])
    return model


def prepared(kind):
    """An adapted layer in double precision, alone in a model, with an input."""
    torch.manual_seed(0)
    build, sample = LAYERS[kind]
    layer, x = build().double(), sample(len(ROWS))
    return with_adapters(layer, type(layer)), layer, x.double() if x.is_floating_point() else x


def each_alone(model, call, rows):
    """What every row gives when its adapter alone is in use."""
    outputs = []
    for i, name in enumerate(rows):
        use(model, *([name] if name else []))
        outputs.append(call(i))
    return torch.stack(outputs)


@pytest.fixture(params=["stacked", "masked"])
def either_way(request, monkeypatch):
    """Whatever the shapes say: with products for each row, or one of the summed rank."""
    costs = float("-inf") if request.param == "stacked" else float("inf")
    monkeypatch.setattr(rows_of_layers, "_GATHERED", costs)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", LAYERS)
def test_equal_to_each_row_alone(kind):
    model, layer, x = prepared(kind)
    expected = each_alone(model, lambda i: layer(x[i : i + 1])[0], ROWS)
    with per_row(model, ROWS):
        torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
        with torch.no_grad():  # the stacked matrices are kept here
            for _ in range(2):
                torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_each_row_alone(kind):
    model, layer, x = prepared(kind)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "lora" in n}
    for i, name in enumerate(ROWS):
        if name:
            use(model, name)
            layer(x[i : i + 1]).square().sum().backward()
            for n, p in model.named_parameters():
                if p.grad is not None:
                    expected[n] += p.grad
                    p.grad = None
    use(model, "fr", "de", "es")
    with per_row(model, ROWS):
        layer(x).square().sum().backward()
    for n, p in model.named_parameters():
        if n in expected:
            torch.testing.assert_close(p.grad, expected[n], msg=n)


@pytest.mark.parametrize(
    ("adapters", "tokens", "stacked"),
    [(64, 16, True), (64, 1, True), (16, 1, False), (4, 8, False)],
)
def test_which_products_are_made_follows_from_the_shapes(adapters, tokens, stacked, monkeypatch):
    model, names, made = nn.Sequential(nn.Linear(8, 8)), [f"a{i}" for i in range(adapters)], []
    for name in names:
        inject(model, r=2, adapter=name)
    by_row = rows_of_layers._Group.by_row
    noted = lambda *args: made.append(args) or by_row(*args)  # noqa: E731
    monkeypatch.setattr(rows_of_layers._Group, "by_row", noted)
    x = torch.randn(adapters, tokens, 8)
    with per_row(model, names):
        model(x)
    assert bool(made) == (stacked and (tokens > 1 or x.is_cpu))


def test_ranks_that_are_equal_are_not_padded():
    model, names = nn.Sequential(nn.Linear(8, 8)), [f"a{i}" for i in range(8)]
    for name in names:
        inject(model, r=2, adapter=name)
    with per_row(model, names), profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(torch.randn(8, 64, 8))
    called = {event.key for event in profiled.key_averages()}
    assert "aten::bmm" in called
    assert "aten::constant_pad_nd" not in called  # which copies what it has nothing to add to


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit"])
def test_in_model_families(name):
    torch.manual_seed(0)
    family, rows = FAMILIES[name], ["de", None]
    model, inputs = family.build().double().eval(), family.inputs()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for i, adapter in enumerate(["fr", "de"]):
        inject(model, "all-linear", r=i + 1, adapter=adapter)
    randomize_adapters(model, names=["fr", "de"])

    def run(i):
        with torch.no_grad():
            return model(**{k: v[i] for k, v in inputs.items()})[0]

    expected = each_alone(model, lambda i: run(slice(i, i + 1))[0], rows)
    with per_row(model, rows):
        torch.testing.assert_close(run(slice(None)), expected, atol=1e-10, rtol=1e-10)


def test_values_that_change_inside_the_block_are_seen():
    torch.manual_seed(0)
    model = with_adapters(nn.Linear(3, 3), nn.Linear)
    layer, x = model[0], torch.randn(2, 3)
    with per_row(model, ["fr", "de"]), torch.no_grad():
        before = layer(x)
        layer.lora_B_fr.add_(1)
        after = layer(x)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_dropout_belongs_to_the_adapter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    inject(model, "0", r=4, adapter="dropped", dropout=0.9)
    inject(model, "0", r=4, adapter="plain")
    randomize_adapters(model, names=["dropped", "plain"])
    x = torch.randn(2, 64)
    with per_row(model, ["dropped", "plain"]):
        first, second = model(x), model(x)
        model.eval()
        assert torch.equal(model(x), model(x))
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])


def test_what_is_in_use_outside_does_not_run_inside():
    torch.manual_seed(0)
    model = Net()
    base, x = copy.deepcopy(model), ids(rows=2)
    inject(model, "q_proj", r=2, adapter="fr", bias="all")
    inject(model, "v_proj", r=2, adapter="de")
    randomize_adapters(model, names=["fr", "de"])
    with torch.no_grad():
        model.head.bias.add_(1)
    before, inside = snapshot(model), model(x)
    with per_row(model, [None, None]):
        assert torch.equal(model(x), base(x))
        with per_row(model, ["de", "de"]):
            assert not torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
        with disabled(model):
            assert torch.equal(model(x), base(x))
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(x), inside)


def test_an_exception_inside_changes_nothing():
    model = with_adapters(nn.Linear(3, 3), nn.Linear)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), per_row(model, ["fr"]):
        1 / 0  # noqa: B018
    assert changed_parts(before, snapshot(model)) == []


def test_another_number_of_rows_is_refused_by_path():
    model = with_adapters(nn.Linear(3, 3), nn.Linear)
    layer = model[0]
    with per_row(model, ["fr", "de"]):
        for x in (torch.randn(3, 3), torch.randn(1, 2, 3)):
            with pytest.raises(LoRAInjectError, match=r"0: its input has \d rows.*given 2"):
                layer(x)
        with pytest.raises(LoRAInjectError, match="no rows"):
            layer(torch.randn(3))


def test_arguments_are_checked_before_anything_changes():
    model = with_adapters(nn.Linear(3, 3), nn.Linear)
    before = snapshot(model)
    for bad in ("fr", [], [1], None, ["fr", "it"]):
        with pytest.raises(ArgumentError, match="adapters"), per_row(model, bad):
            pass
    assert changed_parts(before, snapshot(model)) == []
    lstm = nn.ModuleList([nn.LSTM(3, 3)])
    inject(lstm, nn.LSTM, adapter="fr")
    with pytest.raises(UnsupportedLayerError, match="acts in its weight"), per_row(lstm, ["fr"]):
        pass
    own = Net()
    inject(own, "q_proj", adapter="fr", bias="lora_only")
    with pytest.raises(ArgumentError, match="'fr' trained bias"), per_row(own, ["fr"]):
        pass


def test_nothing_else_is_possible_inside():
    model = with_adapters(nn.Linear(3, 3), nn.Linear)
    calls = [
        strip,
        merge,
        lambda m: use(m, "fr"),
        lambda m: remove(m, "fr"),
        lambda m: plan(m, nn.Linear, adapter="x"),
    ]
    with per_row(model, ["fr"]):
        for call in calls:
            with pytest.raises(LoRAInjectError, match="per_row block"):
                call(model)
    with merged(model), pytest.raises(LoRAInjectError, match="merged"), per_row(model, ["fr"]):
        pass
    with disabled(model), pytest.raises(LoRAInjectError, match="disabled"), per_row(model, ["fr"]):
        pass
    use(model, "fr")
    merge(model)
    unmerge(model)


DROPS = [{"dropout": 0.5}, {"dropout": {"rank": 0.5}}, {"dropout": 0.5, "init": "pissa"},
         {"dropout": 0.3, "variant": "dora"}]  # fmt: skip


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("settings", DROPS, ids=str)
def test_what_dropout_leaves_is_as_large_on_the_whole(settings):
    """And it drops in training alone, for each row anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("fr", "de"):
        inject(model, "0", r=4, adapter=name, **settings)
    randomize_adapters(model, names=["fr", "de"])
    x = torch.randn(2, 8)
    with per_row(model, ["fr", "de"]), torch.no_grad():
        model.eval()
        expected = model(x)
        assert torch.equal(model(x), expected)
        model.train()
        runs = torch.stack([model(x) for _ in range(2000)])
    assert runs.std(0).min() > 0
    error = (runs.mean(0) - expected).abs() / runs.std(0)
    assert error.max() < 5 / 2000**0.5
