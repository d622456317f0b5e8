"""Two products element by element: the values, and what is kept for the backward pass."""

import pytest
import torch

from lora_inject import inject
from lora_inject.arithmetic.hadamard import hadamard


def factors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7), (5, 2), (2, 7), (5, 2))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def composed(A, B, A2, B2):
    return (B @ A) * (B2 @ A2)


def test_values_and_gradients_twice():
    own = factors()
    assert torch.equal(hadamard(*own), composed(*own))
    assert torch.autograd.gradcheck(hadamard, own)
    assert torch.autograd.gradgradcheck(hadamard, own)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use
def test_under_transforms_it_is_composed():
    own = factors()
    for transform in (torch.func.vmap, torch.func.jacrev):
        stacked = [torch.stack([t, t]) for t in own] if transform is torch.func.vmap else own
        torch.testing.assert_close(transform(hadamard)(*stacked), transform(composed)(*stacked))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(own[0], torch.ones_like(own[0]))
        ours, theirs = (
            torch.autograd.forward_ad.unpack_dual(made(dual, *own[1:])).tangent
            for made in (hadamard, composed)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_have_the_dtype_of_the_factors(dtype):
    own = factors(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = hadamard(*own)
        made.float().sum().backward()
    assert all(t.grad.dtype == dtype for t in own)
    expected = torch.autograd.grad(composed(*(t.double() for t in own)).sum(), own)
    for tensor, wanted in zip(own, expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=3e-2, atol=3e-2)


def test_nothing_of_the_size_of_the_weight_is_kept_but_the_weight_that_was_read():
    layer = torch.nn.Linear(64, 48)
    inject(layer, torch.nn.Linear, r=2, variant="loha")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage()) or t, lambda t: t
    ):
        layer(torch.randn(3, 64, requires_grad=True)).sum()
    storages = {storage.data_ptr(): storage.nbytes() for storage in kept}
    assert sum(size >= 64 * 48 * 4 for size in storages.values()) == 1
