"""What every kind of layer promises, kind by kind: one table of layers, one test a promise."""

import copy
import pickle

import pytest
import torch
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_inject import LoRALayer, inject, reset_lora_parameters, strip

pytestmark = pytest.mark.usefixtures("device")


class Experts(nn.Module):
    """A fused weight of two experts, in transformers' form."""

    def __init__(self):
        super().__init__()
        self.is_transposed = False
        self.up_proj = nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, x):
        return torch.cat([x @ self.up_proj[e].T for e in range(2)], dim=-1)


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 3


class Read(nn.Module):
    """Reads the weight of a layer without calling it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


def first(output):
    return output[0] if isinstance(output, tuple) else output


# name: (layer, targets, further arguments, input)
KINDS = {
    "Linear": (lambda: nn.Linear(4, 6), nn.Linear, {}, lambda: torch.randn(3, 4)),
    "Linear in parts": (
        lambda: nn.Linear(4, 6), nn.Linear, {"parts": {nn.Linear: ("q", None, "v")}},
        lambda: torch.randn(3, 4),
    ),
    "Conv1D": (lambda: Conv1D(6, 4), Conv1D, {}, lambda: torch.randn(3, 4)),
    "Embedding": (lambda: nn.Embedding(5, 4), nn.Embedding, {}, lambda: torch.tensor([1, 4])),
    "scaled Embedding": (lambda: Scaled(5, 4), nn.Embedding, {}, lambda: torch.tensor([1, 4])),
    "Conv2d": (
        lambda: nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d, {}, lambda: torch.randn(2, 4, 5, 5)
    ),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), nn.ConvTranspose2d, {},
        lambda: torch.randn(2, 4, 5, 5),
    ),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(4, 2), [nn.MultiheadAttention, "out_proj"], {},
        lambda: torch.randn(3, 2, 4),
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), "all-linear", {},
        lambda: torch.randn(3, 2, 4),
    ),
    "LSTM": (lambda: nn.LSTM(4, 6, bidirectional=True), nn.LSTM, {}, lambda: torch.randn(3, 2, 4)),
    "GRUCell": (lambda: nn.GRUCell(4, 6), nn.GRUCell, {}, lambda: torch.randn(3, 4)),
    "fused experts": (Experts, "up_proj", {}, lambda: torch.randn(3, 4)),
    "read weight": (Read, "proj", {"how": "weight"}, lambda: torch.randn(3, 4)),
}  # fmt: skip


def make(name, dtype=torch.float32):
    build, targets, arguments, make_input = KINDS[name]
    layer, x = build().to(dtype), make_input()
    x = x.to(dtype) if x.is_floating_point() else x

    def call(module):
        many = isinstance(module, nn.MultiheadAttention)
        return first(module(x, x, x) if many else module(x))

    return layer, call, {"targets": targets, "r": 2, "alpha": 3, **arguments}


def base_output(layer, call):
    """The output of the frozen layer, as freezing alone may change how torch multiplies."""
    return call(copy.deepcopy(layer).requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_step_zero_is_bit_equal(name, dtype):
    layer, call, arguments = make(name, dtype)
    expected = base_output(layer, call)
    inject(layer, **arguments)
    assert torch.equal(call(layer), expected)
    with torch.no_grad():
        assert call(layer).dtype == dtype


@pytest.mark.parametrize("name", KINDS)
def test_training_mode_equals_eval_mode(name):
    layer, call, arguments = make(name, torch.float64)
    expected = base_output(layer, call)
    inject(layer, **arguments)
    randomize_adapters(layer, 0.5)
    trained = call(layer.train())
    assert (trained - expected).abs().max() > 1e-3
    torch.testing.assert_close(call(layer.eval()), trained, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(call(layer.eval()), trained, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_gradcheck(name):
    layer, call, arguments = make(name, torch.float64)
    inject(layer, **arguments)
    randomize_adapters(layer, 0.5)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: call(layer), parameters)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", KINDS)
def test_strip_after_training(name, bias):
    layer, call, arguments = make(name)
    before, expected = snapshot(layer), call(layer)
    inject(layer, bias=bias, **arguments)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        call(layer).pow(2).sum().backward()
        optimizer.step()
    assert not torch.equal(call(layer), expected)
    strip(layer)
    assert changed_parts(before, snapshot(layer)) == []
    assert torch.equal(call(layer), expected)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", KINDS)
def test_copies_compute_the_same_and_can_be_stripped(name, through):
    layer, call, arguments = make(name)
    state = [(key, tensor.clone()) for key, tensor in layer.state_dict().items()]
    inject(layer, **arguments)
    randomize_adapters(layer, 0.5)
    twin = through(layer)
    assert torch.equal(call(twin), call(layer))
    strip(twin)
    assert any(isinstance(m, LoRALayer) for m in layer.modules())
    for (key, tensor), (other, value) in zip(state, twin.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_from_meta_gets_the_eager_values(name, device):
    layer, call, arguments = make(name)
    base = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with torch.device("meta"):
        twin = KINDS[name][0]()
    for each in (layer, twin):
        inject(each, seed=7, **arguments)
    twin.to_empty(device=device)
    twin.load_state_dict(base, strict=False)
    reset_lora_parameters(twin)
    for one, other in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(call(layer), call(twin))
