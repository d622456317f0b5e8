"""Every way of the arithmetic: values, gradients, randomness, and what is kept for backward."""

from typing import Any

import pytest
import torch
from helpers import randomize_adapters
from products import (
    SCALING,
    I,
    O,
    R,
    assert_all_close,
    assert_near,
    gradients,
    layer,
    make,
    plain,
    saved,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective

from lora_inject import inject, merge, remove, use
from lora_inject.arithmetic import linear as ways
from lora_inject.arithmetic.linear import adapted_linear
from lora_inject.arithmetic.masks import HASHED
from lora_inject.arithmetic.whole import adapted_product
from lora_inject.core.layer import SCALES

pytestmark = pytest.mark.usefixtures("device")

# Elsewhere dropout is torch's own: it keeps a mask, which depends on dtype and strides.
DROPPED_ON_CPU = pytest.param(0.3, marks=pytest.mark.cpu("dropout keeps seeds there alone"))
MASKS = pytest.mark.cpu("masks are made of seeds there alone")

SHAPES = [(), (5,), (2, 3), (2, 1, 3), (0,), (0, 3)]
WAYS = ["whole", "composed"]


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ways, "_LARGE", 0)  # the Functions at every size


# Values and gradients


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_dropout_it_is_the_composed_way(way, shape):
    tensors = make(*shape)
    x, _, _, A, B = tensors
    y, expected = layer(way, 0.0)(*tensors), plain(*tensors)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    assert_all_close(gradients(y, (x, A, B)), gradients(expected, (x, A, B)))


@MASKS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_dropout_it_is_the_composed_way_over_the_same_mask(way, shape, monkeypatch):
    masks: list[Tensor] = []
    kept = HASHED.kept

    def recorded(*args):
        masks.append(kept(*args))
        return masks[-1].clone()

    monkeypatch.setattr(HASHED, "kept", recorded)
    tensors = make(*shape)
    x, W, b, A, B = tensors
    y = layer(way, 0.25)(*tensors)
    dropped_x = x * masks[0].view(x.shape) / 0.75
    expected = F.linear(x, W, b) + SCALING * F.linear(F.linear(dropped_x, A), B)
    torch.testing.assert_close(y, expected)
    assert_all_close(gradients(y, (x, A, B)), gradients(expected, (x, A, B)))
    torch.testing.assert_close(masks[0], masks[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_first_and_second_derivatives(way, dropout):
    x, W, b, A, B = make(3)

    def fn(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer(way, dropout)(x, W, b, A, B)

    assert torch.autograd.gradcheck(fn, (x, A, B))
    assert torch.autograd.gradgradcheck(fn, (x, A, B))


@pytest.mark.parametrize("frozen", ["x", "A", "B", "xA", "xB", "AB"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_derivatives_where_something_is_frozen(frozen, dropout):
    x, W, b, A, B = make(3)
    named = {"x": x, "A": A, "B": B}
    free = [t for name, t in named.items() if name not in frozen]
    for name in frozen:
        named[name].requires_grad_(False)

    def fn(*free: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer("whole", dropout)(x, W, b, A, B)

    assert torch.autograd.gradcheck(fn, free)
    assert torch.autograd.gradgradcheck(fn, free)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_trained_base_gets_its_gradients(dropout):
    x, W, b, A, B = make(5)
    W.requires_grad_(), b.requires_grad_()
    y = layer("whole", dropout)(x, W, b, A, B)
    expected = F.linear(x, W, b)
    assert_all_close(gradients(y, (W, b)), gradients(expected, (W, b)))


def test_several_branches():
    x, W, b, A, B = make(5)
    y = adapted_linear(x, W, b, [(A, B, 1.0, 0.0, None), (2 * A, B, 0.5, 0.0, None)])
    torch.testing.assert_close(y, F.linear(x, W, b) + 2 * F.linear(F.linear(x, A), B))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_second_backward_pass_finds_the_same(way, dropout):
    x, W, b, A, B = make(2, 3, dtype=torch.float32)
    y = layer(way, dropout)(x, W, b, A, B)
    first = gradients(y, (x, A, B), retain=True)
    for a, b_ in zip(first, gradients(y, (x, A, B)), strict=True):
        assert torch.equal(a, b_)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing(reentrant, dropout):
    x, W, b, A, B = make(2, 3, dtype=torch.float32)

    def run(again: bool) -> list[Tensor]:
        torch.manual_seed(3)
        for t in (x, A, B):
            t.grad = None

        def body(x: Tensor) -> Tensor:
            h = layer("whole", dropout)(x, W, b, A, B).tanh()
            return layer("whole", dropout)(h @ W, W, b, A, B)

        y = checkpoint(body, x, use_reentrant=reentrant) if again else body(x)
        torch.rand(7)  # what comes after moves the generator on
        y.square().sum().backward()
        return [y, *(t.grad for t in (x, A, B) if t.grad is not None)]

    for a, b_ in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b_)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_no_input_is_changed(way, dropout):
    tensors = make(2, 3)
    before = [t.detach().clone() for t in tensors]
    layer(way, dropout)(*tensors).sum().backward()
    assert all(torch.equal(t, kept) for t, kept in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dropout", [0.0, DROPPED_ON_CPU])
def test_noncontiguous_x(dropout):
    x, W, b, A, B = make(6)
    x = torch.randn(I, 2, 6, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    assert not x.is_contiguous()
    y = layer("whole", dropout)(x, W, b, A, B)
    torch.manual_seed(5)
    y = layer("whole", dropout)(x, W, b, A, B)
    torch.manual_seed(5)
    expected = layer("whole", dropout)(x.detach().contiguous().requires_grad_(), W, b, A, B)
    torch.testing.assert_close(y, expected)


# What is kept for the backward pass


def besides_x(dropout):
    """The sizes of what a layer keeps for 64 rows: h, and the seeds of a mask."""
    return [64 + I // 4, 64 * R] if dropout else [64 * R]


@pytest.mark.parametrize("dropout", [0.0, DROPPED_ON_CPU])
@pytest.mark.parametrize("shape", [(64,), (4, 16)])
def test_backward_keeps_x_h_and_what_is_as_small(dropout: float, shape: tuple[int, ...]):
    x, W, b, A, B = make(*shape, dtype=torch.float32)
    with saved() as found:
        layer("whole", dropout)(x, W, b, A, B)
    storages = {t.untyped_storage().data_ptr(): t.numel() for t in found}
    for known in (x, W, A, B):
        storages.pop(known.untyped_storage().data_ptr())
    assert sorted(storages.values()) == besides_x(dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_frozen_A_does_not_keep_x(dropout):
    x, W, b, A, B = make(64, dtype=torch.float32)
    A.requires_grad_(False)
    with saved() as found:
        layer("whole", dropout)(x, W, b, A, B)
    assert x.data_ptr() not in {t.data_ptr() for t in found}


# Dropout


def mask_of(shape, p, dtype=torch.float32):
    size = torch.Size(shape)
    return HASHED.kept(size, dtype, round(p * 65536), HASHED.draw_seeds(torch.empty(size)))


@MASKS
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_keeps_its_share_everywhere(p):
    rows, columns = 2048, 512
    n = rows * columns
    keep = mask_of((rows, columns), p).double()
    q = 1 - round(p * 65536) / 65536
    deviation = (q * (1 - q)) ** 0.5
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert abs(keep.mean() - q) < 5 * deviation / n**0.5
    lanes = keep.view(-1, 4)
    assert (lanes.mean(0) - q).abs().max() < 5 * deviation / (n / 4) ** 0.5
    for dim in (0, 1):  # the spread of row and column means is that of independent elements
        count = keep.shape[dim]
        z = (keep.mean(dim) - q) / (deviation / count**0.5)
        assert z.abs().max() < 5.5
        assert 0.85 < z.square().mean() < 1.15
    centred = (keep - q) / deviation
    flat = centred.flatten()
    for lag in (1, 2, 3, 4, 5, 8, columns - 1, columns, columns + 1, 4 * columns):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / n**0.5
    correlation = torch.corrcoef(lanes.t()) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / (n / 4) ** 0.5


def correlations(rows: Tensor) -> Tensor:
    """Of each row with each other one."""
    return torch.corrcoef(rows)[torch.ones(len(rows), len(rows)).triu(1).bool()]


@MASKS
@pytest.mark.parametrize("p", [0.25, 0.5])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_two_rows_or_columns_of_a_mask_depend_on_each_other(p, seed):
    # They share keys, so this is where a weak hash would show; 130,000 pairs.
    torch.manual_seed(seed)
    keep = mask_of((512, 2048), p).double()
    for mask in (keep, keep.t()[:512]):  # rows, columns
        found = correlations(mask) * mask.shape[1] ** 0.5
        assert found.abs().max() < 6
        assert 0.98 < found.square().mean() < 1.02
    # Four corners of a rectangle: their keys are not independent, their elements are to be.
    centred = (keep - (1 - p)) / (p * (1 - p)) ** 0.5
    corners = centred[:-1, :-4] * centred[1:, :-4] * centred[:-1, 4:] * centred[1:, 4:]
    assert abs(corners.mean()) < 5 / corners.numel() ** 0.5


@MASKS
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 6), (1, 1)])
def test_a_mask_has_any_shape(shape):
    found = mask_of(shape, 0.1, torch.bfloat16)
    assert found.shape == shape
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()


def test_dropout_is_unbiased():
    x, W, b, A, B = (t.detach() for t in make(5))
    expected = plain(x, W, b, A, B)
    runs = torch.stack([layer("whole", 0.3)(x, W, b, A, B) for _ in range(2000)])
    error = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - expected) / error).abs().max() < 5


def test_masks_differ_from_call_to_call_and_repeat_with_the_seed():
    tensors = make(5)
    torch.manual_seed(1)
    first, second = (layer("whole", 0.3)(*tensors) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(layer("whole", 0.3)(*tensors), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [1e-7, 1 - 1e-9])
def test_probabilities_at_the_ends_stay_finite(p):
    y = layer("whole", p)(*make(5))
    assert y.isfinite().all()


# Dtypes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, DROPPED_ON_CPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slow", [True, False])
def test_float32_adapters_on_16_bits(
    way: str, dropout: float, dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ways, "_SLOW", frozenset({dtype} if slow else ()))
    x, W, b, A, B = make(2, 16, dtype=dtype, adapters=torch.float32)
    torch.manual_seed(1)
    y = layer(way, dropout)(x, W, b, A, B)
    found = gradients(y, (x, A, B))
    assert y.dtype == dtype
    assert [g.dtype for g in found] == [dtype, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in (x, W, b, A, B)]
    torch.manual_seed(1)
    expected = layer(way, dropout)(*exact)
    assert_near([y.double()], [expected])
    of = (exact[0], exact[3], exact[4])
    wide = [g.double() for g in found]
    assert_near(wide, gradients(expected, of))


@pytest.mark.parametrize("dropout", [0.0, DROPPED_ON_CPU])
def test_slow_16_bits_keep_no_float32_copy_of_x_or_W(
    dropout: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ways, "_SLOW", frozenset({torch.bfloat16}))
    x, W, b, A, B = make(64, dtype=torch.bfloat16, adapters=torch.float32)
    with saved() as found:
        layer("whole", dropout)(x, W, b, A, B)
    storages = {t.untyped_storage().data_ptr(): t.numel() for t in found}
    for known in (x, W, A, B):
        storages.pop(known.untyped_storage().data_ptr())
    assert sorted(storages.values()) == besides_x(dropout)


def test_a_product_in_another_dtype_is_the_float64_one_and_has_all_derivatives():
    x, W, b, _, _ = make(4)
    W.requires_grad_(), b.requires_grad_()
    torch.testing.assert_close(
        adapted_product(x, W, b, torch.float32, [], []),
        F.linear(x, W, b).float(),
        rtol=1e-5,
        atol=1e-5,
    )

    def fn(*args: Tensor) -> Tensor:
        return adapted_product(*args, torch.float64, [], [])

    assert torch.autograd.gradcheck(fn, (x, W, b))
    assert torch.autograd.gradgradcheck(fn, (x, W, b))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast(way, dropout, device):
    x, W, b, A, B = make(2, 16, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(way, dropout)(x, W, b, A, B)
    assert y.dtype == torch.bfloat16
    found = gradients(y, (x, A, B))
    assert {g.dtype for g in found} == {torch.float32}
    torch.manual_seed(1)
    expected = layer(way, dropout)(x, W, b, A, B)
    assert_near([y.float()], [expected])
    assert_near(found, gradients(expected, (x, A, B)))


# Transforms, compilers, modes


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_compiles_in_one_graph(backend: str, way: str, dropout: float):
    torch.compiler.reset()
    x, W, b, A, B = make(2, 3, dtype=torch.float32)
    compiled = torch.compile(layer(way, dropout), backend=backend, fullgraph=True)
    y = compiled(x, W, b, A, B)
    gradients(y, (x, A, B))
    if not dropout:
        torch.testing.assert_close(y, plain(x, W, b, A, B))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_func(way, dropout):
    x, W, b, A, B = (t.detach() for t in make(3, 4))

    def f(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return layer(way, dropout)(x, W, b, A, B)

    rows: Tensor = torch.vmap(f, (0, None, None), randomness="different")(x, A, B)
    pairs = torch.vmap(f, (None, 0, 0), randomness="different")(
        x[0], torch.stack([A, 2 * A]), torch.stack([B, B])
    )
    slope = torch.func.grad(lambda A: f(x, A, B).square().sum())(A)
    tangent = torch.func.jvp(lambda x: f(x, A, B), (x,), (torch.ones_like(x),))[1]
    assert slope.shape == A.shape
    if not dropout:
        torch.testing.assert_close(rows, plain(x, W, b, A, B))
        torch.testing.assert_close(pairs[1], plain(x[0], W, b, 2 * A, B))
        expected = plain(torch.ones_like(x), W, torch.zeros_like(b), A, B)
        torch.testing.assert_close(tangent, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_mode(dropout):
    x, W, b, A, B = (t.detach() for t in make(3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y = layer("whole", dropout)(dual, W, b, A, B)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None
    if not dropout:
        expected = plain(torch.ones_like(x), W, torch.zeros_like(b), A, B)
        torch.testing.assert_close(tangent, expected)


def test_selective_checkpointing_may_keep_what_the_base_returned():

    x, W, b, A, B = make(5)

    def contexts() -> Any:
        must = CheckpointPolicy.MUST_SAVE
        return selective(lambda *args, **kwargs: must)

    y = checkpoint(layer("whole", 0.0), x, W, b, A, B, use_reentrant=False, context_fn=contexts)
    assert_all_close(gradients(y, (x, A, B)), gradients(plain(x, W, b, A, B), (x, A, B)))


def test_tensor_subclasses_take_the_plain_way():
    class Tagged(Tensor):
        pass

    x, W, b, A, B = (t.detach() for t in make(5))
    tagged = W.as_subclass(Tagged)
    y = layer("whole", 0.3)(x, tagged, b, A, B)
    assert type(y) is Tagged


def test_without_gradients_and_in_inference_mode():
    x, W, b, A, B = make(1)
    expected = plain(x, W, b, A, B).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer("whole", 0.0)(x, W, b, A, B), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer("whole", 0.0)(x, W, b, A, B), expected)
        assert layer("whole", 0.3)(x, W, b, A, B).shape == expected.shape


# The layer, which has to find out when the fast way is right


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
    expected = 2 * F.linear(x, layer.weight, layer.bias) + x @ layer.lora_A.t() @ layer.lora_B.t()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, DROPPED_ON_CPU])
def test_backward_keeps_no_copy_of_what_is_cast(dtype, autocast, dropout, device):
    x, W, b, A, B = make(64, dtype=dtype, adapters=torch.float32)
    with saved() as found, torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = layer("whole", dropout)(x, W.requires_grad_(False), b, A, B)
        assert y.dtype == (torch.bfloat16 if autocast else dtype)
    known = {t.untyped_storage().data_ptr() for t in (x, W, A, B)}
    copies = {t.untyped_storage().data_ptr(): t for t in found}
    sizes = [t.numel() for address, t in copies.items() if address not in known]
    assert sorted(sizes) == sorted(besides_x(dropout))  # nor autocast's copy of W


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


def test_several_gradients_at_once_have_one_mask():
    x, W, b, A, B = make(5)
    torch.manual_seed(1)
    y = layer("whole", 0.3)(x, W, b, A, B)
    g = torch.randn(3, *y.shape, dtype=y.dtype)
    (all_at_once,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    for found, one in zip(all_at_once, g, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, one, retain_graph=True)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_may_be_used_as_freely_as_that_of_the_layer(bias):
    model = nn.Sequential(nn.Linear(I, O, bias=bias))
    x = torch.randn(2, 3, I)
    views = [model(x)._is_view()]
    inject(model, "0", r=R)
    assert [*views, model(x)._is_view()] == [bias, bias]


def test_gradients_are_contiguous_whatever_the_size():
    x, W, b, A, B = make(40)
    y = layer("whole", 0.0)(x, W, b, A, B)
    assert all(g.is_contiguous() for g in gradients(y, (x, A, B)))


@pytest.mark.parametrize("forward", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", WAYS)
def test_autocast_around_the_backward_pass_changes_nothing(way, dropout, forward, device):
    tensors = make(2, 16, dtype=torch.float32)
    of = (tensors[0], tensors[3], tensors[4])
    torch.manual_seed(1)
    with torch.autocast(device.type, forward, enabled=forward is not None):
        y = layer(way, dropout)(*tensors)
    expected = gradients(y, of, retain=True)
    with torch.autocast(device.type, torch.bfloat16 if forward is None else torch.float16):
        found = gradients(y, of)
    assert_near(found, expected)
    if way == "whole" and (device.type == "cpu" or not dropout):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_dtypes_that_torch_refuses_are_refused_in_training_too():
    x, W, b, A, B = make(16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        layer("whole", 0.0)(x, W, b.double(), A, B)


@pytest.mark.parametrize("trains", ["A", "B", "W"])
def test_what_the_backward_pass_does_not_read_may_be_written_to_before_it(trains):
    x, W, b, A, B = (t.detach() for t in make(16))
    tensors = {"A": A, "B": B, "W": W}
    tensors[trains].requires_grad_()
    y = layer("whole", 0.0)(x, W, b, A, B)
    with torch.no_grad():
        tensors[trains].add_(1)
    (found,) = gradients(y, [tensors[trains]])
    assert found.isfinite().all()


def test_a_made_h_is_kept_once():
    x, W, b, A, B = make(64, dtype=torch.float32)
    A.requires_grad_(False)
    with saved() as found:
        layer("whole", 0.3)(x, W, b, A, B)
    assert len([t for t in found if t.shape == (64, R)]) == 1
