"""What becomes of a target: its kind, its weights, its dtype, or why it cannot be adapted."""

import pytest
import torch
from torch import nn

from lora_inject import AlreadyAdaptedError, ArgumentError, UnsupportedLayerError, inject, plan

pytestmark = pytest.mark.cpu("nothing is computed")


def of_dtype(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return nn.ModuleDict({"fc": layer})


@pytest.mark.parametrize(
    ("base", "default"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_adapters_are_of_float32_or_the_base_s_dtype(base, default):
    (site,) = plan(of_dtype(base), "fc", r=1).sites
    assert site.dtype == default
    (site,) = plan(of_dtype(base), "fc", r=1, dtype="base").sites
    assert site.dtype == base


@pytest.mark.parametrize("base", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_the_dtype_of_a_base_in_which_nothing_can_train_is_refused(base):
    (site,) = plan(of_dtype(base), "fc", r=1).sites
    assert site.dtype == torch.float32
    assert site.base_elements == 16
    with pytest.raises(ArgumentError, match=r'^fc: dtype="base": .* nothing can train'):
        plan(of_dtype(base), "fc", r=1, dtype="base")


def matrices():
    model = nn.Module()
    for name, shape in (("K", (4, 4)), ("W", (4, 4)), ("kernel", (2, 2, 2, 2))):
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return nn.ModuleDict({"own": model})


def test_a_kernel_that_belongs_to_no_layer_is_refused_with_a_layout_too():
    for settings in ({}, {"layout": "out_in"}):
        with pytest.raises(UnsupportedLayerError, match="two or three dimensions"):
            plan(matrices(), {"kernel": settings}, r=1)


def test_an_adapter_may_come_to_another_parameter_of_its_module():
    model = matrices()
    inject(model, "own.K", r=1)
    with pytest.raises(AlreadyAdaptedError):
        plan(model, "own.K", r=1)
    assert [site.path for site in plan(model, "own.W", r=1).sites] == ["own.W"]
