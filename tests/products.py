"""The product of an adapted linear layer, its plain form, and what is made and kept for it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lora_inject.arithmetic.linear import adapted_linear, linear_down, linear_up, may_run_whole

I, O, R = 24, 20, 4  # noqa: E741
SCALING = 1.5


def make(*shape, dtype=torch.float64, adapters=None):
    x = torch.randn(*shape, I).to(dtype).requires_grad_()
    W, b = (torch.randn(O, I) / I**0.5).to(dtype), torch.randn(O).to(dtype)
    A = (torch.randn(R, I) / I**0.5).to(adapters or dtype).requires_grad_()
    B = torch.randn(O, R).to(adapters or dtype).requires_grad_()
    return x, W, b, A, B


def layer(way: str, dropout: float) -> Callable[..., Tensor]:
    """One branch on a layer with the values of ``make`` as arguments, as ``layer.py`` does it."""

    def whole(x, W, b, A, B):
        branches = [(A, B, SCALING, dropout, None)]
        if may_run_whole(x, W, branches):
            return adapted_linear(x, W, b, branches)
        return composed(x, W, b, A, B)

    def composed(x, W, b, A, B):
        y, delta = F.linear(x, W, b), linear_up(linear_down(x, A, dropout), B)
        return torch.add(y, delta.to(y.dtype), alpha=SCALING)

    return whole if way == "whole" else composed


def plain(x, W, b, A, B):
    return F.linear(x, W, b) + SCALING * F.linear(F.linear(x, A), B)


def gradients(y, of, retain=False):
    g = torch.linspace(-1, 1, y.numel()).bfloat16().to(y.dtype).view(y.shape)
    return list(torch.autograd.grad(y, of, g, retain_graph=retain))


def assert_all_close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b)


def assert_near(left, right):
    """Equal but for the rounding of 16 bits, which grows where a sum cancels."""
    for a, b in zip(left, right, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """What is kept for the backward pass of the block."""
    found: list[Tensor] = []

    def pack(t):
        found.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield found


def held(run: Callable[[], object]) -> int:
    """The bytes that a call leaves allocated on the CPU while what it returns is held.

    Unlike ``saved`` it changes nothing of what is kept: hooks switch some savings off.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    return sum(event.self_cpu_memory_usage for event in profiler.events())


class Made(TorchDispatchMode):
    """The shapes of the tensors of some size that are made inside, views of others aside."""

    def __init__(self, model, size):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.size, self.shapes, self.held = size, Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.known.add(t.untyped_storage().data_ptr())
                self.held.append(t)  # so that no other gets its place
                if t.untyped_storage().nbytes() // t.element_size() >= self.size:
                    self.shapes[tuple(t.shape)] += 1
        return result
