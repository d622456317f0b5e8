"""Models for the tests of files, and what PEFT makes of a directory."""

import copy
import warnings

import torch
from helpers import Net, ids, train_steps
from torch import nn

from lora_inject import inject

SAFE = "adapter_model.safetensors"


def trained(bias="none", seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    inject(model, ["q_proj", "v_proj"], r=2, alpha=3, bias=bias, **options)
    train_steps(model, ids())
    return model


def bare():
    torch.manual_seed(0)
    return Net()


class Nested(nn.Module):
    """One layer at the path a.b, called with what the kind needs."""

    def __init__(self, layer):
        super().__init__()
        self.a = nn.ModuleDict({"b": layer})
        self.c = nn.Linear(2, 2)

    def forward(self, *args):
        result = self.a["b"](*args)
        return result[0] if isinstance(result, tuple) else result


class Experts(nn.Module):
    """Two fused weights; ``is_transposed`` says how they stand, if it is there."""

    def __init__(self, transposed=None):
        super().__init__()
        shape = (3, 4, 6) if transposed else (3, 6, 4)
        self.up = nn.Parameter(torch.randn(shape))
        self.down = nn.Parameter(torch.randn(shape[0], shape[2], shape[1]))
        if transposed is not None:
            self.is_transposed = transposed

    def forward(self, x):
        flip = getattr(self, "is_transposed", False)
        up, down = (w if flip else w.transpose(1, 2) for w in (self.up, self.down))
        return torch.stack([torch.relu(x @ up[e]) @ down[e] for e in range(3)]).sum(0)


def peft_loads(base, folder):
    """PEFT's model of a copy of the base, from our directory, without a warning."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*groups > 1. Merging is not supported")
        for category in (DeprecationWarning, FutureWarning):  # of transformers by PEFT
            warnings.filterwarnings("ignore", category=category)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        return self.head(self.emb(tokens))
