"""One layer of every kind, with its targets and an input."""

import copy

import torch
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.pytorch_utils import Conv1D


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
    "grouped Linear": (
        lambda: DeepseekV4GroupedLinear(4, 6, 2), DeepseekV4GroupedLinear, {},
        lambda: torch.randn(3, 2, 4),
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
