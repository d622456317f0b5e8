"""Quantized bases: torchao, bitsandbytes, and layers like GPTQ's; their own forward runs."""

import pytest
import torch
from families import llama
from helpers import changed_parts, quantize, randomize_adapters, snapshot, train_steps
from torch import nn
from torch.nn import functional as F

from lora_inject import LoRALayer, UnsupportedLayerError, inject, plan, report, strip

pytestmark = pytest.mark.usefixtures("device")


def quantized_llama(config):
    model = llama()
    quantize(model.model, config)  # not the head, whose weight is that of no other layer
    return model.eval()


def values(model):
    """The state of a quantized model as plain numbers, as the subclasses have no bytes."""
    return {
        name: tensor.dequantize().clone() if hasattr(tensor, "dequantize") else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("config", ["int8", "int4"])
def test_torchao(config):
    model, inputs = quantized_llama(config), {"input_ids": torch.randint(3, 60, (2, 7))}
    before = values(model)
    modules = [(n, type(m), id(m)) for n, m in model.named_modules()]
    parameters = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    expected = model(**inputs)[0]
    shown = inject(model, "all-linear", r=2)
    assert torch.equal(model(**inputs)[0], expected)
    assert shown.split["lora_A"] > 0
    first = train_steps(model, inputs, steps=1)
    assert train_steps(model, inputs, steps=10) < first
    for module in model.modules():
        if isinstance(module, LoRALayer):
            assert module.lora_A.grad.any()
            assert module.lora_B.grad.any()
    strip(model)
    assert [(n, type(m), id(m)) for n, m in model.named_modules()] == modules
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == parameters
    after = values(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(**inputs)[0], expected)


def test_quantizing_after_inject_leaves_the_adapters_alone():
    model, inputs = llama().eval(), {"input_ids": torch.randint(3, 60, (2, 7))}
    inject(model, "q_proj", r=2)
    randomize_adapters(model)
    layer = model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A, layer.lora_B
    quantize(model.model, "int8")
    assert isinstance(layer, LoRALayer)
    assert layer.lora_A is A
    assert layer.lora_B is B
    assert A.requires_grad
    assert type(layer.weight.data) is not torch.Tensor
    train_steps(model, inputs)
    strip(model)
    assert type(layer) is nn.Linear


def test_a_quantized_weight_is_not_added_to():
    model = quantized_llama("int8")
    with pytest.raises(UnsupportedLayerError, match="quantized"):
        inject(model, "q_proj", how="weight")


def test_the_report_counts_a_quantized_weight_by_its_logical_shape():
    plain, model = llama(), quantized_llama("int8")
    assert report(model).total == report(plain).total
    held = report(model.requires_grad_(False)).memory.frozen.weights
    assert held["int8"] > 0


@pytest.mark.cpu("its layers are moved there")
def test_bitsandbytes():
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        layer = layer.to("cpu")
        x = torch.randn(3, 64)
        expected = layer(x)
    except Exception as error:
        pytest.skip(f"bitsandbytes does not run on this machine: {type(error).__name__}: {error}")
    packed = layer.weight.detach().clone()
    inject(layer, nn.Linear, r=2)
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer(x), expected)
    train_steps(layer, x)
    assert layer.lora_B.any()
    assert report(layer).total == 64 * 64 + 64 + 2 * 2 * 64
    strip(layer)
    assert torch.equal(layer.weight, packed)
    assert torch.equal(layer(x), expected)


class Packed(nn.Module):
    """What GPTQ-style layers look like: no Linear, packed integers, features as attributes."""

    def __init__(self, spelling):
        super().__init__()
        names = {"new": ("in_features", "out_features"), "old": ("infeatures", "outfeatures")}
        for name, size in zip(names[spelling], (6, 4), strict=True):
            setattr(self, name, size)
        self.register_buffer("qweight", torch.randint(-8, 8, (4, 6)).int())
        self.register_buffer("scales", torch.rand(4, 1))

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype))


@pytest.mark.parametrize("spelling", ["new", "old"])
def test_layers_like_those_of_gptq(spelling):
    model, x = nn.Sequential(Packed(spelling), nn.Linear(4, 2)), torch.randn(3, 6)
    before, expected = snapshot(model), model(x)
    shown = inject(model, "all-linear", r=2)
    assert shown.patterns[0].layers == 2
    assert torch.equal(model(x), expected)
    assert model[0].lora_A.shape == (2, 6)
    train_steps(model, x)
    assert model[0].lora_B.any()
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    with pytest.raises(UnsupportedLayerError, match="packed"):
        inject(model, "0", how="weight")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(dtype):
    class Float8(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype), self.bias)

    layer, x = Float8(6, 4), torch.randn(3, 6)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    expected = layer(x)
    inject(layer, nn.Linear, r=2)
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer(x), expected)
    train_steps(layer, x)
    strip(layer)
    assert torch.equal(layer(x), expected)


def test_a_packed_weight_counts_as_what_it_stands_for():
    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(8, 6, bias=False)
            del self.weight
            self.register_buffer("weight", torch.zeros(24, 1, dtype=torch.uint8))

        def forward(self, x):
            return x @ torch.ones(8, 6)

    (site,) = plan(nn.Sequential(Packed()), "0", r=2).sites
    assert site.base_elements == 8 * 6
