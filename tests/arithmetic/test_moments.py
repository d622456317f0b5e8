"""Moments of vectors, against what torch makes of all of them at once in float64."""

import pytest
import torch

from lora_inject.arithmetic.moments import Moments

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("features", [1, 5, 700])
@pytest.mark.parametrize("groups", [(), (3,)])
def test_they_are_the_mean_and_the_squares_about_it(groups, features):
    x = (3 + torch.randn(*groups, 20, features)).double()
    moments = Moments.total([Moments.of(part) for part in x.split([1, 12, 0, 7], -2)])
    centred = x - x.mean(-2, keepdim=True)
    assert moments.count == 20
    torch.testing.assert_close(moments.mean, x.mean(-2))
    torch.testing.assert_close(moments.scatter, centred.mT @ centred)
    torch.testing.assert_close(moments.second, x.mT @ x / 20)
    torch.testing.assert_close(moments.scatter, moments.scatter.mT)
    assert moments.variance == pytest.approx(float(centred.square().sum()) / 20)


def test_shares_fall_and_directions_are_orthonormal():
    x = torch.randn(50, 6) * torch.tensor([5.0, 4, 3, 2, 1, 0])
    moments = Moments.of(x)
    shares, directions = moments.shares(6), moments.directions(4)
    assert torch.equal(shares, shares.sort(descending=True).values)
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares[-1]) == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(directions @ directions.mT, torch.eye(4).to(directions))
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()


def test_dimensions_count_directions_of_equal_variance():
    even = torch.cat([torch.eye(8), -torch.eye(8)])
    assert Moments.of(even).dimensions == pytest.approx(8)
    assert Moments.of(even[:, :1] @ torch.ones(1, 8)).dimensions == pytest.approx(1)
    assert Moments.of(torch.ones(4, 8)).dimensions == 0


def test_no_vectors_are_nothing():
    x = torch.randn(4, 3)
    one, none = Moments.of(x), Moments.of(x[:0])
    for both in (one.plus(none), none.plus(one)):
        assert both.count == 4
        torch.testing.assert_close(both.mean, one.mean)
        torch.testing.assert_close(both.scatter, one.scatter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bits_are_float32(dtype):
    x = torch.randn(4000, 3).to(dtype)
    moments = Moments.of(x)
    assert moments.scatter.dtype is torch.float32
    torch.testing.assert_close(moments.mean.double(), x.double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 3])
def test_what_is_not_finite_is_known_wherever_it_stands(value, at):
    x = torch.randn(9, 5)
    assert Moments.of(x).is_finite
    x[4, at] = value
    assert not Moments.of(x).is_finite
    assert not Moments.of(torch.randn(3, 5)).plus(Moments.of(x)).is_finite
