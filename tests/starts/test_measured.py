"""EVA, CorDA and LoRA-GA: starts from statistics, against their formulas in float64."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from every_kind import make
from helpers import Net, changed_parts, ids, quantize, snapshot
from torch import nn

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    UnsupportedLayerError,
    calibrate,
    inject,
    merge,
    plan,
    reset_lora_parameters,
    strip,
    unmerge,
)
from lora_inject.core.state import adapters_of
from lora_inject.starts import EVA, CorDA, LoRAGA

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted"),
]
STARTS = {
    "eva": EVA,
    "corda ipm": CorDA,
    "corda kpm": lambda stats: CorDA(stats, mode="kpm"),
    "lora_ga": LoRAGA,
}
KINDS = ["Linear", "Linear in parts", "Conv1D", "Conv2d", "ConvTranspose2d"]
every_start = pytest.mark.parametrize("start", STARTS)


def squared(output, _):
    return output.float().square().mean()


def statistics(model, targets, batches):
    return calibrate(
        model, targets, batches, gradients=True, loss=squared, progress=False
    )  # fmt: skip


def of_kind(kind, dtype):
    """A layer, what calls it, the arguments of inject, and its statistics."""
    layer, call, arguments = make(kind, dtype)
    arguments["r"] = 2 if kind in ("Linear", "Conv1D") else 1  # LoRA-GA takes twice as many
    seen = []
    handle = layer.register_forward_hook(lambda _, args, y: seen.append(args[0]))
    call(layer)
    handle.remove()
    batches = [torch.cat([seen[0], seen[0].flip(0).roll(1, -1) * 2]) for _ in range(2)]
    return layer, call, arguments, statistics(layer, arguments["targets"], batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@every_start
def test_step_zero_is_bit_equal_and_everything_comes_back(start, kind, dtype):
    layer, call, arguments, stats = of_kind(kind, dtype)
    expected = call(copy.deepcopy(layer).requires_grad_(False))
    before = snapshot(layer)
    inject(layer, **arguments, init=STARTS[start](stats))
    assert torch.equal(call(layer), expected)
    trained = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))
    moved = call(layer)
    assert not torch.equal(moved, expected)
    merge(layer)
    unmerge(layer)
    assert torch.equal(call(layer), moved)
    strip(layer)
    assert changed_parts(before, snapshot(layer)) == []


def by_hand(start, stats, W, x, s, r):
    """A and B as the papers write them, of the inputs one under the other."""
    if start == "eva":
        A = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:r]
        return A, torch.zeros(len(W), r).double()
    if start == "lora_ga":
        U, _, Vh = torch.linalg.svd(stats.gradient_of("proj").double())
        c = len(W) ** 0.25 / 4
        return c * Vh[:r], c * U[:, r : 2 * r]
    C = x.T @ x / len(x)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C)).double()
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    V = torch.linalg.inv(C) @ Vh.T
    at = slice(0, r) if start == "corda ipm" else slice(len(S) - r, len(S))
    root = (S[at] / s).sqrt()
    return (V[:, at] * root).T, U[:, at] * root


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@every_start
def test_the_values_are_those_of_the_paper(start, scaling):
    model = nn.ModuleDict({"proj": nn.Linear(6, 5)}).double()
    x = torch.randn(40, 6).double() * torch.arange(1, 7)
    model.forward = lambda x: model["proj"](x)
    stats = statistics(model, "proj", [x[:10], x[10:]])
    inject(model, "proj", r=2, alpha=3, scaling=scaling, init=STARTS[start](stats))
    layer = model["proj"]
    s = adapters_of(layer)[0].settings.scaling
    A, B = by_hand(start, stats, layer.weight.detach(), x, s, 2)
    if start == "eva":  # signs are nobody's
        torch.testing.assert_close((layer.lora_A * A).sum(-1).abs(), torch.ones(2).double())
        assert not layer.lora_B.any()
    elif start == "lora_ga":
        torch.testing.assert_close(layer.lora_A.T @ layer.lora_A, A.T @ A)
        torch.testing.assert_close(layer.lora_B @ layer.lora_B.T, B @ B.T)
    else:
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, B @ A)
        torch.testing.assert_close(layer.lora_A.norm(dim=1), A.norm(dim=1))
    assert hasattr(layer, "lora_A0") == (start != "eva")


@every_start
def test_over_a_quantized_base(start):
    model, x = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8)), torch.randn(40, 32)
    plain = copy.deepcopy(model)
    quantize(model, "int8")
    with torch.no_grad():
        for i in (0, 2):
            plain[i].weight.copy_(model[i].weight.dequantize())
    expected = model(x)
    stats, same = (statistics(m, ["0", "2"], [x[:30], x[30:]]) for m in (model, plain))
    for path in ("0", "2"):
        torch.testing.assert_close(
            stats.gradient_of(path), same.gradient_of(path), rtol=1e-3, atol=1e-6
        )
    inject(model, ["0", "2"], r=3, init=STARTS[start](stats))
    assert torch.equal(model(x), expected)
    inject(plain, ["0", "2"], r=3, init=STARTS[start](same))
    own, theirs = (m[0].lora_B @ m[0].lora_A for m in (model, plain))
    torch.testing.assert_close(own, theirs, rtol=1e-2, atol=1e-4)
    assert torch.equal(strip(model)(x), expected)


@every_start
def test_on_meta_and_again(start):
    model = Net()
    batches = [ids(3, 7)]
    stats = statistics(model, ["q_proj", "o_proj"], batches)
    with torch.device("meta"):
        twin = Net()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    for each in (model, twin):
        inject(each, ["q_proj", "o_proj"], r=2, init=STARTS[start](stats), seed=1)
    twin.to_empty(device=next(model.parameters()).device)
    twin.load_state_dict(state, strict=False)
    reset_lora_parameters(twin)
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@every_start
def test_a_copy_refers_to_the_statistics_and_a_pickle_leaves_them_out(start):
    model = Net()
    stats = statistics(model, "o_proj", [ids(3, 7)])
    inject(model, "o_proj", r=2, init=STARTS[start](stats))
    layer = model.layers[0].o_proj
    reset_lora_parameters(copy.deepcopy(model))
    assert adapters_of(copy.deepcopy(layer))[0].settings.start.stats is stats
    twin = pickle.loads(pickle.dumps(model))
    assert adapters_of(twin.layers[0].o_proj)[0].settings.start.stats is None
    assert torch.equal(twin.layers[0].o_proj.lora_A, layer.lora_A)
    with pytest.raises(LoRAInjectError, match=r"^layers.0.o_proj: .* pickled model leaves"):
        reset_lora_parameters(twin)


@every_start
def test_statistics_are_freed_with_the_adapter(start):
    model = Net()
    stats = statistics(model, "o_proj", [ids(3, 7)])
    alive = weakref.ref(stats)
    inject(model, "o_proj", r=2, init=STARTS[start](stats))
    strip(model)
    del stats
    gc.collect()
    assert alive() is None


@every_start
def test_what_statistics_do_not_tell_is_refused(start):
    model, make_start = Net(), STARTS[start]
    stats = statistics(model, ["q_proj", "v_proj"], [ids(3, 7)])
    name = start.split()[0]
    before = snapshot(model)
    with pytest.raises(
        UnsupportedLayerError, match=rf"^layers.0.q_proj: init=.{name}. starts from"
    ):
        inject(model, "q_proj", init=name)
    with pytest.raises(UnsupportedLayerError, match=r"^layers.0.o_proj: .* nothing of it"):
        inject(model, "o_proj", r=2, init=make_start(stats))
    with pytest.raises(UnsupportedLayerError, match=r"^layers.0.q_proj: .* fewer than r="):
        inject(model, "q_proj", r=9, init=make_start(stats))
    other = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(5, 8)})])})
    with pytest.raises(UnsupportedLayerError, match=r"^layers.0.q_proj: .* features, not"):
        inject(other, "q_proj", r=2, init=make_start(stats))
    with pytest.raises(ArgumentError, match=r"^stats must be what calibrate returns, not a dict"):
        make_start({})
    assert changed_parts(before, snapshot(model)) == []


def test_what_was_zero_tells_nothing():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    stats = statistics(model, "0", [torch.zeros(5, 4)])
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* inputs were all zero"):
        inject(model, "0", r=2, init=CorDA(stats))
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* gradient was zero"):
        inject(model, "0", r=2, init=LoRAGA(stats))
    few = statistics(model, "0", [torch.randn(3, 4)])
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* 3 inputs .* in 2 directions"):
        inject(model, "0", r=3, init=EVA(few))
    without = calibrate(model, "0", [torch.randn(9, 4)], progress=False)
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* with gradients=True"):
        plan(model, "0", r=2, init=LoRAGA(without))


def test_arguments_are_checked():
    with pytest.raises(ArgumentError, match=r"^mode must"):
        CorDA(mode="abc")
    with pytest.raises(ArgumentError, match=r"^gamma must"):
        LoRAGA(gamma=0)


def test_a_start_may_stand_in_the_mapping_of_targets():
    model = Net()
    stats = statistics(model, "q_proj", [ids(3, 7)])
    inject(model, {"q_proj": {"r": 2, "init": EVA(stats)}, "v_proj": {"r": 2, "init": "pissa"}})
    A = model.layers[0].q_proj.lora_A
    torch.testing.assert_close(A @ A.T, torch.eye(2, device=A.device))
