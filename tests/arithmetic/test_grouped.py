"""A change of low rank for each group of rows: its values, its derivatives and its ways."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from lora_inject.arithmetic import grouped

WAYS = {"stacked": grouped._Stacked, "by group": grouped._Grouped}


def case(sizes, r=3, dtype=torch.float64, i=8, o=16):
    """Rows of groups of these sizes, and two factors, the first of which is stored turned."""
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    x = torch.randn(sum(sizes), i).to(dtype).requires_grad_()
    A = torch.randn(len(sizes), r, i).to(dtype).requires_grad_()
    R = torch.randn(len(sizes), r, o).to(dtype).requires_grad_()
    return x, A, R, ends


def expected(x, A, R, ends):
    return product(x, A.mT @ R, offs=ends)


def product(x, M, *, offs):
    """What torch's product by groups is, in float64 too."""
    parts = [slice(*ends) for ends in pairwise([0, *offs.tolist()])]
    if M.dim() == 3:
        return torch.cat([x[part] @ M[g] for g, part in enumerate(parts)])
    return torch.stack([x[:, part] @ M[part] for part in parts])


def change(x, A, R, ends, way):
    made = grouped._stacked(x, ends) if way == "stacked" else grouped._Grouped(ends, product)
    return grouped._GroupedChange.apply(x, A.mT, R, made, x.dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (1, 1), (0, 2)])
def test_values_and_gradients_are_those_of_each_group_by_itself(way, sizes):
    inputs, g = case(sizes), torch.randn(sum(sizes), 16, dtype=torch.float64)
    wanted = expected(*inputs)
    gradients = torch.autograd.grad(wanted, inputs[:3], g)
    y = change(*inputs, way)
    torch.testing.assert_close(y, wanted)
    found = torch.autograd.grad(y, inputs[:3], g)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride(-1) == 1  # as the leaves


@pytest.mark.parametrize("way", WAYS)
def test_it_can_be_differentiated_again(way):
    *inputs, ends = case((2, 0, 3), i=4, o=4)
    torch.autograd.gradgradcheck(lambda *leaves: change(*leaves, ends, way), inputs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_what_needs_no_gradient_gets_none(way, needed):
    *inputs, ends = case((2, 0, 3))
    for i, leaf in enumerate(inputs):
        leaf.requires_grad_(i in needed)
    change(*inputs, ends, way).sum().backward()
    wanted = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in inputs]
    expected(*wanted, ends).sum().backward()
    for leaf, other in zip(inputs, wanted, strict=True):
        assert (leaf.grad is None) == (other.grad is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, other.grad)


@pytest.fixture
def used(monkeypatch):
    """The ways that were used."""
    found = []
    for name, way in WAYS.items():

        def noted(self, *args, name=name, times=way.times):
            found.append(name)
            return times(self, *args)

        monkeypatch.setattr(way, "times", noted)
    return found


@pytest.mark.parametrize(
    ("sizes", "dtype", "slow", "way"),
    [
        ((3, 0, 5, 1), torch.bfloat16, False, "stacked"),
        ((1,) * 40, torch.bfloat16, False, "stacked"),
        ((400, *[0] * 15), torch.bfloat16, False, "by group"),  # stacked, it would be 6,400 rows
        ((3, 0, 5, 1), torch.bfloat16, True, "by group"),
        ((3, 0, 5, 1), torch.float32, False, "by group"),
    ],
)
def test_a_cpu_stacks_rows_of_16_bits_where_that_is_less(
    sizes, dtype, slow, way, used, monkeypatch
):
    monkeypatch.setattr(grouped, "is_slow_on_cpu", lambda _: slow)
    x, A, R, ends = case(sizes, dtype=dtype)
    y = grouped.grouped_change(x, A.mT, R, ends, F.grouped_mm)
    assert set(used) == {way}
    wanted = expected(*(t.double() for t in (x, A, R)), ends)
    assert (y.double() - wanted).norm() < 0.02 * wanted.norm()
    assert y.dtype == (torch.float32 if slow else dtype)


def test_rows_of_no_group_are_left_to_torch(used):
    """Those of experts on other devices stand last."""
    x, A, R, ends = case((3, 0, 5, 1), dtype=torch.bfloat16)
    more = torch.cat([x, x.new_ones(2, 8)])
    y = grouped.grouped_change(more, A.mT, R, ends, F.grouped_mm)
    assert set(used) == {"by group"}
    wanted = expected(x, A, R, ends)
    torch.testing.assert_close(y[:9], wanted, atol=0.5, rtol=0.02)
    assert len(y) == 11
