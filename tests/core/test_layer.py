"""The layer, which has to find out when the fast way is right."""

import pytest
import torch
from helpers import randomize_adapters
from products import SCALING, I, O, R, assert_all_close, gradients, plain, saved
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from lora_inject import inject, merge, remove, use
from lora_inject.arithmetic import linear as ways
from lora_inject.arithmetic.linear import adapted_linear
from lora_inject.core.scales import SCALES

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ways, "_LARGE", 0)  # the Functions at every size


@pytest.fixture
def linear():
    model = nn.Sequential(nn.Linear(I, O)).double()
    inject(model, "0", r=R, alpha=SCALING * R)
    randomize_adapters(model)
    return model


def expected_of(layer, x, W=None):
    """What a layer returns, from its tensors."""
    W = layer.weight if W is None else W
    return plain(x, W, layer.bias, layer.lora_A, layer.lora_B)


def test_a_layer_takes_the_fast_way_where_it_is_right(linear, monkeypatch):
    calls = []
    counted = lambda *args: calls.append(1) or adapted_linear(*args)  # noqa: E731
    monkeypatch.setattr("lora_inject.core.layer.adapted_linear", counted)
    x = torch.randn(2, 3, I, dtype=torch.float64)
    torch.testing.assert_close(linear(x), expected_of(linear[0], x))
    assert calls == [1]
    torch.func.vmap(linear)(x)
    torch.compile(linear, backend="eager", fullgraph=True)(x)
    assert calls == [1]


SHAPES_OF_LAYERS = [(), (1,), (5,), (64,), (2, 3), (4, 32), (1, 1), (2, 3, 4), (2, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES_OF_LAYERS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer_starts_with_the_bits_of_the_frozen_one(shape, strided, bias, dtype):
    frozen = nn.Linear(I, O, bias=bias).to(dtype).requires_grad_(False)
    model = nn.Sequential(nn.Linear(I, O, bias=bias)).to(dtype)
    model[0].load_state_dict(frozen.state_dict())
    inject(model, "0", r=R)
    x = torch.randn(*shape, I).to(dtype)
    if strided:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(model(x), frozen(x))
    with torch.no_grad():
        assert torch.equal(model(x), frozen(x))


def test_hooks_on_the_layer_see_the_adapted_output(linear):
    seen = []
    linear[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    linear[0].register_forward_hook(lambda module, args, y: seen.append(y) or y + 1)
    linear[0].register_full_backward_hook(lambda module, gx, gy: (3 * gx[0],))
    x = torch.randn(5, I, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    expected = expected_of(linear[0], 2 * x)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(y, expected + 1)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, 3 * torch.autograd.grad(expected.sum(), x)[0])


def test_a_subclass_with_a_forward_of_its_own_is_called():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(I, O).double())
    inject(model, "0", r=R)
    randomize_adapters(model)
    layer, x = model[0], torch.randn(5, I, dtype=torch.float64)
    expected = 2 * (F.linear(x, layer.weight, layer.bias) + x @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(model(x), expected)


def test_a_forward_that_is_patched_for_all_linear_layers_is_not_bypassed(monkeypatch):
    original = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 2 * original(self, input))

    class Fresh(nn.Linear):  # its adapted class is made while the patch is there
        pass

    model = nn.Sequential(Fresh(I, O).double())
    x = torch.randn(5, I, dtype=torch.float64)
    before = model(x)
    inject(model, "0", r=R)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("of", ["weight", "bias", "lora_A"])
def test_what_is_computed_when_it_is_read_is_read(linear, of):
    class Triple(nn.Module):
        def forward(self, W):
            return 3 * W

    x = torch.randn(5, I, dtype=torch.float64)
    layer = linear[0]
    tensors = {
        name: getattr(layer, name).clone() for name in ("weight", "bias", "lora_A", "lora_B")
    }
    tensors[of] = 3 * tensors[of]
    parametrize.register_parametrization(layer, of, Triple())
    torch.testing.assert_close(linear(x), plain(x, *tensors.values()))


def test_a_pruned_layer(linear):
    x = torch.randn(5, I, dtype=torch.float64)
    prune.l1_unstructured(linear[0], "weight", 0.5)
    torch.testing.assert_close(linear(x), expected_of(linear[0], x))
    assert (linear[0].weight == 0).any()


def test_functional_call_and_an_ensemble(linear):
    x = torch.randn(5, I, dtype=torch.float64)
    doubled = {"0.lora_B": 2 * linear[0].lora_B.detach()}
    y = torch.func.functional_call(linear, doubled, (x,))
    layer = linear[0]
    expected = plain(x, layer.weight, layer.bias, layer.lora_A, 2 * layer.lora_B)
    torch.testing.assert_close(y, expected)
    stacked = {"0.lora_B": torch.stack([0 * layer.lora_B, 2 * layer.lora_B]).detach()}
    both = torch.vmap(lambda own: torch.func.functional_call(linear, own, (x,)))(stacked)
    torch.testing.assert_close(both[1], expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tracing(linear):
    x = torch.randn(5, I, dtype=torch.float64)
    traced = torch.jit.trace(linear, (x,))
    torch.testing.assert_close(traced(2 * x), linear(2 * x))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_nested_and_sparse_inputs():
    model = nn.Sequential(nn.Linear(I, O))
    inject(model, "0", r=R, alpha=SCALING * R)
    randomize_adapters(model)
    rows = [torch.randn(n, I) for n in (2, 4)]
    nested = torch.nested.nested_tensor(rows, layout=torch.strided)
    for y, x in zip(model(nested).unbind(), rows, strict=True):
        torch.testing.assert_close(y, expected_of(model[0], x))
    x = torch.randn(5, I).relu()
    torch.testing.assert_close(model(x.to_sparse()), expected_of(model[0], x))


@pytest.mark.parametrize("inplace", [True, False])
def test_what_comes_after_may_write_into_the_output(linear, inplace):
    x = torch.randn(2, 3, I, dtype=torch.float64, requires_grad=True)
    of = (x, linear[0].lora_A, linear[0].lora_B)
    y = F.relu(linear(x), inplace=inplace)
    assert_all_close(gradients(y, of), gradients(expected_of(linear[0], x).relu(), of))


def test_merging_between_forward_and_backward_is_noticed(linear):
    x = torch.randn(5, I, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    merge(linear)  # the gradient of x needs the weight that y was made with
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_a_conv1d_of_transformers_takes_the_fast_way():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(O, I)).double()
    x = torch.randn(2, 3, I, dtype=torch.float64, requires_grad=True)
    before = model(x)
    inject(model, "0", r=R, alpha=SCALING * R)
    assert type(model[0]).__mro__[1].__name__ == "WholeLayer"
    assert torch.equal(model(x), before)
    randomize_adapters(model)
    layer = model[0]
    expected = plain(x, layer.weight.t(), layer.bias, layer.lora_A, layer.lora_B)
    torch.testing.assert_close(model(x), expected)
    of = (x, layer.lora_A, layer.lora_B)
    assert_all_close(gradients(model(x), of), gradients(expected, of))
    with saved() as kept_tensors:
        model(x)
    large = {t.data_ptr() for t in kept_tensors if t.numel() >= x.numel()}
    assert large <= {x.data_ptr(), layer.weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_injecting_changes_no_bit_of_16_bits_at_inference(dtype, monkeypatch):
    monkeypatch.setattr(ways, "_SLOW", frozenset({dtype}))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    x = torch.randn(32, 64).to(dtype)
    with torch.no_grad():
        before = model(x)
        inject(model, nn.Linear, r=R)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("how", ["auto", "weight"])
def test_scales_change_without_compiling_again(how):
    counts = []

    def counted(graph, inputs):
        counts.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(I, O), nn.ReLU(), nn.Linear(O, I)).double()
    x = torch.randn(5, I, dtype=torch.float64)
    for name in ("fr", "de"):
        inject(model, nn.Linear, r=R, adapter=name, how=how)
    randomize_adapters(model)
    compiled = torch.compile(model, backend=counted, fullgraph=True)
    for fr, de in ((1, 1), (0.7, 0.3), (0.5, 0.5), (0.1, 0.2), (1, 1)):
        use(model, {"fr": fr, "de": de})
        torch.testing.assert_close(compiled(x), model(x))
    assert len(counts) == 1


def test_scales_follow_the_adapters_and_leave_with_them(linear):
    assert vars(linear[0])[SCALES]["default"][1] == SCALING
    with torch.device("meta"):
        unreal = nn.Sequential(nn.Linear(I, O))
    inject(unreal, "0", r=R, alpha=3 * R)
    assert vars(unreal[0])[SCALES]["default"][1].is_meta
    unreal.to_empty(device="cpu")
    assert vars(unreal[0])[SCALES]["default"][1] == 3
    inject(linear, "0", r=R, adapter="fr")
    remove(linear, "fr")
    assert vars(linear[0])[SCALES].keys() == {"default"}


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_tensors_without_values(adapters):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(I, O)).bfloat16()
        inject(model, "0", r=R, dtype=adapters, dropout=0.1)
        x = torch.randn(4, 5, I, dtype=torch.bfloat16)
    model.train()(x).sum().backward()
    assert model[0].lora_A.grad.dtype == adapters


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("large", [1 << 14, 0])
def test_reentrant_checkpointing_computes_the_same_again(dtype, large, monkeypatch):
    monkeypatch.setattr(ways, "_LARGE", large)
    monkeypatch.setattr(ways, "_SLOW", frozenset({torch.float16}))
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).to(dtype)
    inject(model, "0", r=R, dropout=0.5)
    randomize_adapters(model, scale=10)
    model.train()
    seen = []
    model.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    x = torch.randn(32, 64).to(dtype).requires_grad_()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert len(seen) == 2
    first, again = (y.float() for y in seen)
    assert (first - again).norm() < 0.03 * first.norm()  # another mask would change far more


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_may_be_used_as_freely_as_that_of_the_layer(bias):
    model = nn.Sequential(nn.Linear(I, O, bias=bias))
    x = torch.randn(2, 3, I)
    inject(model, "0", r=R)
    assert not model(x)._is_view()  # that of the layer is one with a bias, where torch is older
    with torch.no_grad():
        y = model(x)
    y.add_(1).requires_grad_()
    y.mul(2).sum().backward()
