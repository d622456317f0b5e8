"""Every way of the arithmetic: values, gradients, randomness, and what is kept for backward."""

from typing import Any

import pytest
import torch
from products import (
    SCALING,
    I,
    R,
    assert_all_close,
    assert_near,
    gradients,
    layer,
    make,
    plain,
    saved,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective

from lora_inject.arithmetic import linear as ways
from lora_inject.arithmetic.linear import adapted_linear
from lora_inject.arithmetic.masks import HASHED
from lora_inject.arithmetic.whole import adapted_product

pytestmark = pytest.mark.usefixtures("device")

# Elsewhere dropout is torch's own: it keeps a mask, which depends on dtype and strides.
DROPPED_ON_CPU = pytest.param(0.3, marks=pytest.mark.cpu("dropout keeps seeds there alone"))

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


@pytest.mark.cpu("masks are made of seeds there alone")
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


def test_gradients_are_contiguous_whatever_the_size():
    x, W, b, A, B = make(40)
    y = layer("whole", 0.0)(x, W, b, A, B)
    assert all(g.is_contiguous() for g in gradients(y, (x, A, B)))


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


# Dropout


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


def test_several_gradients_at_once_have_one_mask():
    x, W, b, A, B = make(5)
    torch.manual_seed(1)
    y = layer("whole", 0.3)(x, W, b, A, B)
    g = torch.randn(3, *y.shape, dtype=y.dtype)
    (all_at_once,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    for found, one in zip(all_at_once, g, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, one, retain_graph=True)[0])


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
