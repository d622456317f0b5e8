"""Tools of torch on a layer whose adapter acts in its weight: they work, or are refused before."""

import copy
import io

import pytest
import torch
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune

from lora_inject import LoRAInjectError, inject, strip

pytestmark = pytest.mark.usefixtures("device")


class Experts(nn.Module):
    """A fused weight, read as a whole and by expert."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.is_transposed = 2, False
        self.up_proj = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return x @ self.up_proj[0].T + torch.einsum("...i,eoi->...o", x, self.up_proj + 0)


class Reading(nn.Module):
    """A layer that is read and never called."""

    def __init__(self):
        super().__init__()
        self.p = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.p.weight, self.p.bias)


MODELS = {
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), "all-linear"),
    "attention": (lambda: Attending(8, 2), "all-linear"),
    "LSTM": (lambda: nn.LSTM(8, 8, bidirectional=True), nn.LSTM),
    "GRU": (lambda: nn.GRU(8, 8), nn.GRU),
    "read": (Reading, "p"),
    "experts": (Experts, "up_proj"),
}


class Attending(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


def adapted(name):
    build, targets = MODELS[name]
    model = build().double()
    inject(model, targets, r=2)
    randomize_adapters(model, 0.5)
    return model


def call(function, *args):
    y = function(*args)
    return y[0] if isinstance(y, tuple) else y


def inputs():
    return torch.randn(3, 2, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_values_in_place_of_parameters_are_used(name):
    model, x = adapted(name), inputs()
    other = copy.deepcopy(model)
    randomize_adapters(other, 0.5)
    values = {key: value.detach().clone() for key, value in other.named_parameters()}
    ours = {key: value for key, value in values.items() if "lora_" in key}
    for given in (values, ours):
        torch.testing.assert_close(call(functional_call, model, given, (x,)), call(other, x))
    assert not torch.allclose(call(model, x), call(other, x))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_by_torch_func_equal_those_of_autograd(name):
    model, x = adapted(name), inputs()
    ours = {key: value.detach() for key, value in model.named_parameters() if "lora_" in key}
    found = grad(lambda values: call(functional_call, model, values, (x,)).pow(2).sum())(ours)
    call(model, x).pow(2).sum().backward()
    for key, value in found.items():
        assert value.any()
        torch.testing.assert_close(value, model.get_parameter(key).grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("LSTM", "GRU")])
def test_a_stack_of_adapted_models_runs_as_each_of_them(name):
    models, x = [adapted(name) for _ in range(2)], inputs()
    parameters, buffers = stack_module_state(models)
    run = lambda p, b: call(functional_call, models[0], (p, b), (x,))  # noqa: E731
    for y, model in zip(vmap(run)(parameters, buffers), models, strict=True):
        torch.testing.assert_close(y, call(model, x))


def replica(module):
    """As ``nn.DataParallel`` makes one, which needs several GPUs."""
    made = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(made, name, parameter * 1)
    for name, child in module._modules.items():
        made._modules[name] = child and replica(child)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_replica_of_data_parallel_runs_the_adapters(name):
    model, x = adapted(name), inputs()
    y = call(replica(model), x)
    torch.testing.assert_close(y, call(model, x))
    y.sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def linear():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    inject(model, "0", r=2, how="weight")
    randomize_adapters(model, 0.5)
    return model


def expected(model, W):
    layer = model[0]
    return lambda x: nn.functional.linear(x, W + layer.lora_B @ layer.lora_A, layer.bias)


def test_pruning_goes_on_below_the_adapter():
    model, x = linear(), inputs()
    W = model[0]._parameters["weight"].detach().clone()
    prune.l1_unstructured(model[0], "weight", 0.5)
    W = W * model[0].weight_mask
    torch.testing.assert_close(model(x), expected(model, W)(x))
    prune.remove(model[0], "weight")
    torch.testing.assert_close(model(x), expected(model, W)(x))
    strip(model)
    assert torch.equal(model[0].weight, W)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_older_norms_go_on_below_the_adapter(norm):
    model, x = linear().eval(), inputs()
    plain = strip(copy.deepcopy(model))[0].eval()
    torch.manual_seed(0)
    getattr(nn.utils, norm)(model[0])
    torch.manual_seed(0)
    getattr(nn.utils, norm)(plain)
    plain(x)
    torch.testing.assert_close(model(x), expected(model, plain.weight)(x))
    getattr(nn.utils, f"remove_{norm}")(model[0])
    getattr(nn.utils, f"remove_{norm}")(plain)
    torch.testing.assert_close(model(x), expected(model, plain.weight)(x))
    strip(model)
    torch.testing.assert_close(model[0].weight, plain.weight)


def quantize(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(nn.Sequential(layer), quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    "tool", [parametrizations.weight_norm, parametrizations.orthogonal, quantize]
)
def test_what_would_replace_the_weight_is_refused_before_anything_changes(tool):
    model = linear()
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match=r"^0: tor.* in place of its weight"):
        tool(model[0])
    assert changed_parts(before, snapshot(model)) == []
    strip(model)


WRITES = {
    "copy_": lambda layer, v: layer.weight.copy_(v),
    "data": lambda layer, v: layer.weight.data.copy_(v),
    "data =": lambda layer, v: setattr(layer.weight, "data", v.clone()),
    "[:]": lambda layer, v: layer.weight.__setitem__(slice(None), v),
    "zero_, add_": lambda layer, v: layer.weight.zero_().add_(v),
    "Parameter": lambda layer, v: setattr(layer, "weight", nn.Parameter(v.clone())),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_to_the_weight_reaches_the_base(name):
    model, x, value = linear(), inputs(), torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        WRITES[name](model[0], value)
    torch.testing.assert_close(model(x), expected(model, value)(x))
    strip(model)
    assert torch.equal(model[0].weight, value)


def test_initialisation_reaches_the_base():
    model = linear()
    nn.init.ones_(model[0].weight)
    assert torch.equal(model[0]._parameters["weight"], torch.ones(8, 8, dtype=torch.float64))
    torch.manual_seed(3)
    model[0].reset_parameters()
    torch.manual_seed(3)
    fresh = nn.Linear(8, 8, dtype=torch.float64)
    assert torch.equal(strip(model)[0].weight, fresh.weight)


def test_writes_to_fused_weights_reach_the_base():
    model = adapted("experts")
    nn.init.zeros_(model.up_proj)
    assert not model._parameters["up_proj"].any()


def test_get_parameter_gives_the_parameter():
    model = adapted("encoder layer")
    for path, parameter in model.named_parameters():
        assert model.get_parameter(path) is parameter
    assert not isinstance(model.linear1.weight, nn.Parameter)


def test_the_weight_that_is_read_trains_adapters():
    layer = linear()[0]
    (layer.weight**2).sum().backward()
    assert layer.lora_A.grad.any()
    assert layer.weight.requires_grad
    assert type(layer.weight + 0) is torch.Tensor
    assert type(layer.weight.detach()) is torch.Tensor


def test_an_error_of_a_missing_attribute_is_not_swallowed():
    model = linear()
    del model[0]._parameters["lora_A"]
    with pytest.raises(LoRAInjectError, match=r"^0: its effective weight .*lora_A"):
        model(inputs())
    model = nn.Sequential(adapted("GRU"))
    del model[0]._parameters["weight_hh_l0_lora_B"]
    with pytest.raises(LoRAInjectError, match=r"its effective weight_hh_l0 .*lora_B"):
        model(inputs())


def test_a_weight_that_is_read_can_be_stored():
    layer = linear()[0]
    file = io.BytesIO()
    torch.save({"W": layer.weight}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["W"], layer.weight)
