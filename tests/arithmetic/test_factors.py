"""An input that is a product of what autograd keeps: its factors stand in for it, nothing else."""

import pytest
import torch
from products import I, gradients, held, layer, make
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_inject.arithmetic import linear as ways
from lora_inject.arithmetic import product, whole
from lora_inject.arithmetic.linear import linear_down
from lora_inject.compat.torch_private import tells_of_hooks

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.skipif(
        not tells_of_hooks,
        reason="this torch does not say whether a kept tensor is hooked",
    ),
]
ON_CPU = pytest.mark.cpu("its allocator is asked")


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ways, "_LARGE", 0)  # the Functions at every size


@pytest.fixture
def keeps_x(monkeypatch):
    """A call after which the product itself is kept."""

    def keeps_x():
        for module in (whole, product):
            monkeypatch.setattr(module, "keep_factors", lambda *_: None)

    return keeps_x


def gates(*shape, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    g, u = (torch.randn(*shape, I).to(dtype).requires_grad_() for _ in range(2))
    return g, u


def gated(g: Tensor, u: Tensor) -> Tensor:
    """What the last layer of a gated MLP reads."""
    return F.silu(g) * u.sin()


def is_kept(y: Tensor) -> bool:
    """Whether the Function of y keeps x itself."""
    node = y.grad_fn
    while "Product" not in node.name():
        node = node.next_functions[0][0]
    return node._raw_saved_tensors[0].unpack_hook is None


@ON_CPU
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(256,), (4, 64)])
def test_a_gated_mlp_keeps_one_tensor_less(shape, dropout, keeps_x):
    _, *own = make(dtype=torch.float32)
    g, u = gates(*shape)
    with_factors = held(lambda: layer("whole", dropout)(gated(g, u), *own))
    keeps_x()
    with_x = held(lambda: layer("whole", dropout)(gated(g, u), *own))
    assert with_x - with_factors == g.nbytes


@ON_CPU
def test_so_does_a_product_of_its_own(keeps_x):
    A = torch.randn(4, I, requires_grad=True)
    g, u = gates(256, dtype=torch.bfloat16)
    with_factors = held(lambda: linear_down(gated(g, u), A, 0.0))
    keeps_x()
    assert held(lambda: linear_down(gated(g, u), A, 0.0)) - with_factors == g.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(), (64,), (4, 16), (0, 3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_equal_bit_for_bit(shape, dropout, dtype, autocast, keeps_x, device):
    _, W, b, A, B = make(dtype=dtype, adapters=torch.float32)
    g, u = gates(*shape, dtype=dtype)

    def run():
        torch.manual_seed(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = layer("whole", dropout)(gated(g, u), W, b, A, B)
        return gradients(y, (g, u, A, B))

    found = run()
    keeps_x()
    assert all(torch.equal(one, same) for one, same in zip(found, run(), strict=True))


def test_a_product_in_other_strides_is_made_again_in_the_same():
    _, W, b, A, B = make(dtype=torch.float32)
    g, u = (t.t().contiguous().t() for t in gates(64))
    x = gated(g, u)
    y = layer("whole", 0.0)(x, W, b, A, B)
    again = y.grad_fn.saved_tensors[0]
    assert not is_kept(y)
    assert torch.equal(again, x)
    assert again.stride() == x.stride()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_first_and_second_derivatives(dropout):
    _, W, b, A, B = make(dtype=torch.float64)
    g, u = gates(3, dtype=torch.float64)

    def fn(g: Tensor, u: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer("whole", dropout)(gated(g, u), W, b, A, B)

    assert not is_kept(fn(g, u, A, B))
    assert torch.autograd.gradcheck(fn, (g, u, A, B))
    assert torch.autograd.gradgradcheck(fn, (g, u, A, B))


def test_second_derivatives_by_the_product_itself(keeps_x):
    _, W, b, A, B = make(dtype=torch.float64)
    g, u = gates(8, dtype=torch.float64)

    def run():
        x = gated(g, u)
        y = layer("whole", 0.0)(x, W, b, A, B)
        (dA,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
        return torch.autograd.grad(dA.square().sum(), (x, g, u, B))

    found = run()
    keeps_x()
    assert all(torch.equal(one, same) for one, same in zip(found, run(), strict=True))


def test_several_gradients_at_once(keeps_x):
    _, W, b, A, B = make(dtype=torch.float32)
    g, u = gates(8)

    def run():
        y = layer("whole", 0.0)(gated(g, u), W, b, A, B)
        several = torch.linspace(-1, 1, 3 * y.numel()).view(3, *y.shape)
        return torch.autograd.grad(y, (g, u, A, B), several, is_grads_batched=True)

    found = run()
    keeps_x()
    for one, same in zip(found, run(), strict=True):
        torch.testing.assert_close(one, same)


def test_a_factor_written_to_before_the_backward_pass_is_an_error():
    _, W, b, A, B = make(dtype=torch.float32)
    for of in ("A", "g"):
        g, u = gates(8)
        gate, up = F.silu(g), u.sin()
        y = layer("whole", 0.0)(gate * up, W, b, A, B)
        with torch.no_grad():
            up.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, [{"A": A, "g": g}[of]])


def test_what_was_written_into_before_the_layer_is_kept_itself(keeps_x):
    _, W, b, A, B = make(dtype=torch.float32)
    for written in ("x", "up"):
        g, u = gates(8)
        up = u.sin()
        x = F.silu(g) * up
        with torch.no_grad():
            {"x": x, "up": up}[written].add_(1)
        y = layer("whole", 0.0)(x, W, b, A, B)
        assert is_kept(y)
        (found,) = gradients(y, [A])
        (same,) = gradients(layer("whole", 0.0)(x.detach(), W, b, A, B), [A])
        assert torch.equal(found, same)


def test_the_gradient_stays_when_the_product_has_forgotten_its_factors():
    _, W, b, A, B = make(dtype=torch.float32)
    g, u = gates(8)
    x = gated(g, u)
    y = layer("whole", 0.0)(x, W, b, A, B)
    x.sum().backward()
    (found,) = gradients(y, [A])
    (same,) = gradients(layer("whole", 0.0)(x.detach(), W, b, A, B), [A])
    assert torch.equal(found, same)
    assert is_kept(layer("whole", 0.0)(x, W, b, A, B))  # they are gone for a newcomer


def test_a_second_backward_pass_is_refused_and_everything_freed_after_the_first():
    _, W, b, A, B = make(dtype=torch.float32)
    y = layer("whole", 0.0)(gated(*gates(8)), W, b, A, B)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize(
    "product_of",
    [
        lambda g, u: g.sin() * 2.0,
        lambda g, u: g.sin() * u.detach(),
        lambda g, u: g.sin() * u.sin()[:1],
        lambda g, u: g.sin() * u.sin()[:, :1],
        lambda g, u: g.sin() + u.sin(),
        lambda g, u: (g.sin() * u.sin()).clone(),
        lambda g, u: (g.sin() * u.sin()).flip(0),
        lambda g, u: g.sin().double().mul(u.sin()).float(),
    ],
    ids=["number", "constant", "row", "column", "sum", "copy", "turned", "cast"],
)
def test_other_inputs_are_kept_themselves(product_of):
    _, W, b, A, B = make(dtype=torch.float32)
    assert is_kept(layer("whole", 0.0)(product_of(*gates(8)), W, b, A, B))


def test_a_frozen_A_keeps_neither():
    _, W, b, A, B = make(dtype=torch.float32)
    y = layer("whole", 0.0)(gated(*gates(8)), W, b, A.requires_grad_(False), B)
    assert y.grad_fn.saved_tensors[0] is None


def test_two_layers_that_share_it_keep_neither_of_them():
    _, W, b, A, B = make(dtype=torch.float32)
    x = gated(*gates(8))
    assert not any(is_kept(layer("whole", 0.0)(x, W, b, A, B)) for _ in range(2))


def test_hooks_see_the_product_itself():
    _, W, b, A, B = make(dtype=torch.float32)
    seen = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        x = gated(*gates(8))
        layer("whole", 0.0)(x, W, b, A, B)
    assert x.data_ptr() in {t.data_ptr() for t in seen}


def test_a_product_made_under_hooks_is_not_unpacked_by_the_forward():
    _, W, b, A, B = make(dtype=torch.float32)
    g, u = gates(8)
    unpacked = []
    with saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        x = gated(g, u)
    assert is_kept(layer("whole", 0.0)(x, W, b, A, B))
    calls = []
    x = checkpoint(lambda *a: calls.append(1) or gated(*a), g, u, use_reentrant=False)
    assert is_kept(layer("whole", 0.0)(x, W, b, A, B))
    assert not unpacked
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_offloading_change_nothing(reentrant):
    _, W, b, A, B = make(dtype=torch.float32)
    g, u = gates(8)

    def block(g, u):
        return layer("whole", 0.0)(gated(g, u), W, b, A, B)

    expected = gradients(block(g, u), (g, u, A, B))
    with save_on_cpu():
        offloaded = block(g, u)
    found = gradients(offloaded, (g, u, A, B))
    assert all(torch.equal(one, same) for one, same in zip(found, expected, strict=True))
    checkpoint(block, g, u, use_reentrant=reentrant).backward(_gradient(offloaded))
    for tensor, same in zip((g, u, A, B), expected, strict=True):
        assert torch.equal(tensor.grad, same)


def _gradient(y):
    return torch.linspace(-1, 1, y.numel()).bfloat16().to(y.dtype).view(y.shape)
