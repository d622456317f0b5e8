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


def test_a_packed_weight_counts_as_what_its_layer_multiplies_by():
    model = of_dtype(torch.uint8)
    model["fc"].weight = nn.Parameter(model["fc"].weight[:, :2], requires_grad=False)
    (site,) = plan(model, "fc", r=1).sites
    assert site.base_elements == 16


def partitioned(module, name):
    """A parameter as ZeRO-3 leaves it: an empty tensor that knows its shape."""
    parameter = module.get_parameter(name)
    parameter.ds_shape = parameter.shape
    parameter.data = torch.empty(0)


def test_a_matrix_that_zero3_has_partitioned_is_refused():
    model = matrices()
    partitioned(model["own"], "K")
    with pytest.raises(UnsupportedLayerError, match=r"^own\.K: ZeRO-3 has partitioned it"):
        plan(model, "K", r=1)


@pytest.mark.parametrize(
    ("what", "arguments"),
    [("variant='dora'", {"variant": "dora"}), ("init='pissa'", {"init": "pissa"})],
)
def test_what_is_made_from_the_weight_needs_it_whole_and_as_values(what, arguments):
    normed, sharded = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    partitioned(sharded, "weight")
    for layer, problem in ((normed, "the values of its weight"), (sharded, "its whole weight")):
        model = nn.ModuleDict({"fc": layer})
        assert plan(model, "fc", r=1).sites
        with pytest.raises(UnsupportedLayerError, match=f"^fc: {what} needs {problem}, which is"):
            plan(model, "fc", r=1, **arguments)


def test_dropout_is_refused_where_the_input_of_the_product_is_not_seen():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    assert plan(model, nn.MultiheadAttention, r=1).sites
    with pytest.raises(UnsupportedLayerError, match=r"no input for dropout=0\.1"):
        plan(model, nn.MultiheadAttention, r=1, dropout=0.1)
