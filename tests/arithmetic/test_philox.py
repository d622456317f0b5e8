"""Triton's masks of dropout: on a GPU, or in Triton's interpreter in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from products import O, R, assert_near, gradients, layer, make, saved
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_inject import LoRAInjectError, inject
from lora_inject.arithmetic import linear as ways
from lora_inject.arithmetic.masks import KERNELS, Masks, masks_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def philox(device, monkeypatch):
    """The masks, in use at every size, on a GPU or interpreted."""
    if not INTERPRETED and device.type != "cuda":
        pytest.skip("needs --device cuda, or TRITON_INTERPRET=1 from the start of the process")
    pytest.importorskip("triton")
    from lora_inject.arithmetic.philox import PHILOX

    if INTERPRETED:
        _multiply_bfloat16(monkeypatch)
    monkeypatch.setattr(ways, "_LARGE", 0)
    monkeypatch.setattr(ways, "masks_for", lambda x, dtype: PHILOX)
    return PHILOX


def _multiply_bfloat16(monkeypatch):
    """The interpreter multiplies the bits of bfloat16 as integers; here as the numbers they are."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *args):
        for handle in (a, b):
            if str(handle.dtype) == "bf16" and handle.data.dtype == np.uint16:
                handle.data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return original(self, a, b, d, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.cpu("on a GPU the compiled kernels are tested")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_all_of_this_file_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


SHAPES = [(70, 200), (2, 32, 128), (3, 8), (33, 700), (1, 24), (300, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DROPPED = round(0.3 * 65536)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 33])
def test_the_kernels_are_the_composed_products(philox, shape, dtype, rank):
    x, A = torch.randn(shape).to(dtype), torch.randn(rank, shape[-1]).to(dtype)
    t = torch.randn(*shape[:-1], rank).to(dtype)
    seeds = philox.draw_seeds(x)
    kept = philox.kept(x.shape, torch.float64, DROPPED, seeds) * 65536 / (65536 - DROPPED)
    h = philox.down(x, A, DROPPED, seeds, False)
    dx, dA = philox.gradients(t, x, A, x.shape, DROPPED, seeds, False)
    assert [v.dtype for v in (h, dx, dA)] == [dtype] * 3
    assert [v.shape for v in (h, dx, dA)] == [t.shape, x.shape, A.shape]
    x, A, t = x.double(), A.double(), t.double()
    expected = (
        F.linear(kept * x, A),
        kept * (t @ A),
        t.flatten(0, -2).t() @ (kept * x).flatten(0, -2),
    )
    most = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    for found, exact in zip((h, dx, dA), expected, strict=True):
        assert (found.double() - exact).norm() <= most * exact.norm()


def test_only_what_is_needed_is_made(philox):
    x, A, t = torch.randn(40, 64), torch.randn(4, 64), torch.randn(40, 4)
    seeds = philox.draw_seeds(x)
    dx, dA = philox.gradients(t, x, A, x.shape, DROPPED, seeds, False)
    assert torch.equal(philox.gradients(t, x, None, x.shape, DROPPED, seeds, False)[1], dA)
    found = philox.gradients(t, None, A, x.shape, DROPPED, seeds, False)
    assert torch.equal(found[0], dx)
    assert found[1] is None


def test_strided_inputs_and_empty_ones(philox):
    A, wide = torch.randn(4, 64), torch.randn(40, 100)
    seeds = philox.draw_seeds(wide)
    for x in (wide[:, :64], wide[:, 1:65], torch.randn(64, 40).t(), torch.randn(0, 64)):
        h = philox.down(x, A, DROPPED, seeds, False)
        torch.testing.assert_close(h, philox.down(x.contiguous(), A, DROPPED, seeds, False))
        t = torch.randn(len(x), 4)
        for found, same in zip(
            philox.gradients(t, x, A, x.shape, DROPPED, seeds, False),
            philox.gradients(t, x.contiguous(), A, x.shape, DROPPED, seeds, False),
            strict=True,
        ):
            torch.testing.assert_close(found, same)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_a_mask_keeps_its_share_everywhere(philox, p):
    rows, columns = 512, 512
    n, dropped = rows * columns, round(p * 65536)
    x = torch.empty(rows, columns)
    keep = philox.kept(x.shape, torch.float64, dropped, philox.draw_seeds(x))
    q = 1 - dropped / 65536
    deviation = (q * (1 - q)) ** 0.5
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert abs(keep.mean() - q) < 5 * deviation / n**0.5
    for dim in (0, 1):
        z = (keep.mean(dim) - q) / (deviation / keep.shape[dim] ** 0.5)
        assert z.abs().max() < 5.5
        assert 0.8 < z.square().mean() < 1.2
    centred = ((keep - q) / deviation).flatten()
    for lag in (1, 2, 3, 4, 7, 8, 9, 16, columns - 1, columns, columns + 8):
        assert abs((centred[lag:] * centred[:-lag]).mean()) < 5 / n**0.5
    lanes = torch.corrcoef(keep.view(-1, 8).t()) - torch.eye(8, dtype=torch.float64)
    assert lanes.abs().max() < 5.5 / (n / 8) ** 0.5


def test_masks_differ_from_call_to_call_and_repeat_with_the_seed(philox):
    tensors = make(5, dtype=torch.float32)
    torch.manual_seed(1)
    first, second = (layer("whole", 0.3)(*tensors) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(layer("whole", 0.3)(*tensors), first)
    assert not torch.equal(first, second)


def known_mask(philox, x, monkeypatch):
    """What the next dropout of a quarter multiplies x by."""
    drawn = philox.draw_seeds(x)
    monkeypatch.setattr(type(philox), "draw_seeds", lambda self, x: drawn)
    return philox.kept(x.shape, torch.float32, 1 << 14, drawn) / 0.75


@pytest.mark.parametrize("way", ["whole", "composed"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_a_layer_is_the_composed_way_over_the_same_mask(philox, way, shape, monkeypatch):
    x, W, b, A, B = make(*shape, dtype=torch.float32)
    kept = known_mask(philox, x, monkeypatch)
    y = layer(way, 0.25)(x, W, b, A, B)
    expected = F.linear(x, W, b) + 1.5 * F.linear(F.linear(x * kept, A), B)
    torch.testing.assert_close(y, expected)
    for found, same in zip(gradients(y, (x, A, B)), gradients(expected, (x, A, B)), strict=True):
        torch.testing.assert_close(found, same)


def test_it_can_be_differentiated_twice(philox, monkeypatch):
    x, W, b, A, B = make(6, dtype=torch.float32)
    kept = known_mask(philox, x, monkeypatch)

    def second(y):
        first = torch.autograd.grad(y.square().sum(), (x, A, B), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, A, B))

    found = second(layer("whole", 0.25)(x, W, b, A, B))
    expected = second(F.linear(x, W, b) + 1.5 * F.linear(F.linear(x * kept, A), B))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5 * other.abs().max().item())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(philox, reentrant):
    x, W, b, A, B = make(2, 3, dtype=torch.float32)

    def run(again):
        torch.manual_seed(3)
        for t in (x, A, B):
            t.grad = None

        def body(x):
            h = layer("whole", 0.3)(x, W, b, A, B).tanh()
            return layer("whole", 0.3)(h @ W, W, b, A, B)

        y = checkpoint(body, x, use_reentrant=reentrant) if again else body(x)
        torch.rand(7)
        y.square().sum().backward()
        return [y, *(t.grad for t in (x, A, B))]

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


def test_both_grad_modes_draw_alike(philox):
    tensors = make(5, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        without = layer("whole", 0.3)(*tensors)
    torch.manual_seed(1)
    torch.testing.assert_close(layer("whole", 0.3)(*tensors).detach(), without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [None, torch.float32])
def test_16_bits(philox, dtype, adapters, monkeypatch):
    x, W, b, A, B = make(2, 16, dtype=dtype, adapters=adapters)
    kept = known_mask(philox, x, monkeypatch).double()
    y = layer("whole", 0.25)(x, W, b, A, B)
    found = gradients(y, (x, A, B))
    assert y.dtype == dtype
    assert [g.dtype for g in found] == [dtype, A.dtype, B.dtype]
    x, W, b, A, B = (t.detach().double().requires_grad_() for t in (x, W, b, A, B))
    expected = F.linear(x, W, b) + 1.5 * F.linear(F.linear(x * kept, A), B)
    assert_near([y.double()], [expected])
    assert_near([g.double() for g in found], gradients(expected, (x, A, B)))


def test_backward_keeps_x_h_and_one_seed(philox):
    x, W, b, A, B = make(64, dtype=torch.float32)
    with saved() as found:
        layer("whole", 0.3)(x, W, b, A, B)
    storages = {t.untyped_storage().data_ptr(): t.numel() for t in found}
    for known in (x, W, A, B):
        storages.pop(known.untyped_storage().data_ptr())
    assert sorted(storages.values()) == [1, 64 * R]


def test_several_gradients_at_once_have_one_mask(philox):
    x, W, b, A, B = make(5, dtype=torch.float32)
    y = layer("whole", 0.3)(x, W, b, A, B)
    g = torch.randn(3, *y.shape)
    (all_at_once,) = torch.autograd.grad(y, x, g, is_grads_batched=True, retain_graph=True)
    for found, one in zip(all_at_once, g, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(y, x, one, retain_graph=True)[0])


# The switch


@pytest.mark.cpu("it is about the CPU")
def test_the_cpu_has_hashed_masks_whatever_is_forced(monkeypatch):
    for value in ("", "torch", "triton"):
        monkeypatch.setenv(KERNELS, value)
        assert isinstance(masks_for(torch.empty(3, device="cpu"), torch.bfloat16), Masks)


def test_a_gpu_has_triton_or_not_as_the_variable_says(device, monkeypatch):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    x = torch.empty(3, dtype=torch.bfloat16)
    monkeypatch.setenv(KERNELS, "torch")
    assert masks_for(x, x.dtype) is None
    monkeypatch.setenv(KERNELS, "triton")
    assert isinstance(masks_for(x, x.dtype), Masks)
    assert masks_for(x, torch.float64) is None


class _OnAGPU:
    is_cpu, is_cuda = False, True


@pytest.mark.cpu("a GPU is stood in for")
def test_an_unknown_value_or_a_missing_triton_is_an_error(monkeypatch):
    monkeypatch.setenv(KERNELS, "fast")
    with pytest.raises(LoRAInjectError, match="LORA_INJECT_KERNELS is 'fast'"):
        masks_for(_OnAGPU(), torch.bfloat16)
    monkeypatch.setenv(KERNELS, "triton")
    monkeypatch.setattr("lora_inject.arithmetic.masks._has_triton", lambda: False)
    with pytest.raises(LoRAInjectError, match="asks for Triton, which is not installed"):
        masks_for(_OnAGPU(), torch.bfloat16)
    monkeypatch.setenv(KERNELS, "")
    assert masks_for(_OnAGPU(), torch.bfloat16) is None


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_model_trains_with_either(device, kernels, monkeypatch):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    monkeypatch.setenv(KERNELS, kernels)
    monkeypatch.setattr(ways, "_LARGE", 0)
    model = torch.nn.Sequential(torch.nn.Linear(64, O)).bfloat16()
    inject(model, "0", r=R, dropout=0.5)
    x = torch.randn(32, 64).bfloat16().requires_grad_()
    model.train()(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert model[0].lora_B.grad.abs().sum() > 0
