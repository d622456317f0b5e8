"""Every argument is checked before a model is touched, and the error names it."""

import math

import numpy as np
import pytest
import torch
from helpers import Net, snapshot
from torch import nn

from lora_inject import ArgumentError, inject, plan

pytestmark = pytest.mark.cpu("nothing is computed")

BAD = [
    *[("r", value) for value in (0, -1, 2.5, 4.0, True, False, "4", None, math.nan, [4])],
    *[("r", value) for value in (np.float32(4), np.bool_(True), np.int64(0))],
    *[("alpha", value) for value in (0, -1, math.nan, math.inf, True, "16", [1])],
    *[("alpha", value) for value in (np.float32(0), np.float64("nan"), np.bool_(True), 1j)],
    *[("dropout", value) for value in (-0.1, 1, 1.0, 2, math.nan, True, "0.1", None)],
    *[("bias", value) for value in ("lora", None, True, "", "ALL")],
    *[("dtype", value) for value in ("float12", torch.int8, torch.complex64, 32, float)],
    *[("dtype", value) for value in (torch.float8_e4m3fn, torch.bool)],
    *[("seed", value) for value in (-1, 2**63, 1.5, True, "0")],
    *[("adapter", value) for value in ("", "a.b", "a b", None, 3, "ä")],
]


@pytest.mark.parametrize(("argument", "value"), BAD, ids=str)
def test_a_bad_value_is_refused_by_name(argument, value):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=f"^{argument}"):
        inject(model, "q_proj", **{argument: value})
    assert snapshot(model) == before


def test_a_model_must_be_a_module():
    with pytest.raises(ArgumentError, match=r"^model"):
        plan("model", "q_proj")
    with pytest.raises(ArgumentError, match=r"^model"):
        plan(nn.Linear, "q_proj")


@pytest.mark.parametrize(("r", "alpha", "scaling"), [(4, None, 1.0), (4, 16, 4.0), (8, 2.0, 0.25)])
def test_scaling_is_alpha_over_r(r, alpha, scaling):
    for site in plan(Net(), "q_proj", r=r, alpha=alpha).sites:
        assert site.settings.scaling == scaling


@pytest.mark.parametrize("number", [np.int64, np.int32, np.uint8, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(number):
    whole = number if issubclass(number, np.integer) else int
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    shown = plan(
        model, r=whole(4), alpha=number(8), dropout=number(0), seed=whole(3), layers=whole(1)
    )
    (site,) = shown.sites
    assert (site.path, site.settings.r, site.settings.alpha) == ("1", 4, 8.0)
    assert {type(site.settings.r), type(site.settings.alpha)} == {int, float}
    assert str(plan(model, r=4, alpha=8, seed=3, layers=1)) == str(shown)


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float16, 1e6), (torch.bfloat16, 1e39)])
def test_a_scaling_that_the_dtype_cannot_hold_is_refused(dtype, alpha):
    model = nn.Sequential(nn.Linear(8, 8)).to(dtype)
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"^0: alpha: .*overflows"):
        inject(model, "0", r=1, alpha=alpha)
    assert snapshot(model) == before
    inject(model, "0", r=1, alpha=1e4)
