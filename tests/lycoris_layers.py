"""The layers that LyCORIS and PEFT have LoHa and LoKr for, with inputs."""

import torch
from torch import nn


class Layers(nn.Module):
    """The layers that LyCORIS knows, one of them grouped."""

    def __init__(self):
        super().__init__()
        self.lin, self.conv = nn.Linear(12, 18), nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.one, self.line = nn.Conv2d(6, 8, 1), nn.Conv1d(6, 8, 3)

    def forward(self, x):
        return [layer(x[name]) for name, layer in self.named_children()]


NAMES = ["lin", "conv", "one", "line"]
INPUTS = {
    "lin": torch.randn(3, 12, generator=torch.Generator().manual_seed(0)),
    "conv": torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(1)),
    "one": torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(2)),
    "line": torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(3)),
}


def layers():
    torch.manual_seed(0)
    return Layers().eval()


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def of_weights(model, changes):
    """What a model computes with other weights, by the name of a layer."""
    values = {f"{name}.weight": weight for name, weight in changes.items()}
    return torch.func.functional_call(model, values, (INPUTS,))


def close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
