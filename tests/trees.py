"""Module trees at random: nested, shared, tied, with odd names and classes that override much.

Every module maps (N, 4) to (N, 4). What chooses is a ``random.Random``, which can be hypothesis's.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrizations

WIDTH = 4
NAMES = (
    "a", "b", "q_proj", "v_proj", "0", "7", "lora_A", "lora_proj", "default", "é", "x y",
    "layer-1", "*", "[q]", "?", "re:a", "base_layer", "modules_to_save", "module", "_orig_mod",
    "self", "head", "lm_head", "bias_proj", "running", "layers", "٣",
)  # fmt: skip


class Chain(nn.Module):
    """Its children one after the other."""

    def forward(self, x):
        for child in self.children():
            x = torch.tanh(run(child, x))
        return x


class Setting(Chain):
    """Notes what is set, and refuses what it does not know once it is closed."""

    def __init__(self):
        super().__init__()
        self.closed = False

    def __setattr__(self, name, value):
        if self.__dict__.get("closed") and name not in self.__dict__ and name not in self._modules:
            raise TypeError(f"{name} is none of its attributes")
        super().__setattr__(name, value)


class Getting(Chain):
    """Finds the attributes of its first child as its own."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not (children := list(self._modules.values())):
                raise
            return getattr(children[0], name)


class Slots:
    __slots__ = ("note",)


class Slotted(Slots, Chain):
    """A class with slots beside nn.Module."""

    def __init__(self):
        super().__init__()
        self.note = 1


@dataclass(eq=False)
class Data(Chain):
    """A dataclass."""

    size: int = WIDTH

    def __post_init__(self):
        super().__init__()


class SlottedLinear(Slots, nn.Linear):
    """A layer with slots."""


class OwnLinear(nn.Linear):
    """A layer whose forward is its own."""

    def forward(self, x):
        return super().forward(x) * 2


class Matrix(nn.Module):
    """A parameter of its own that it multiplies by."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("shift", torch.ones(WIDTH), persistent=False)

    def forward(self, x):
        return x @ self.w + self.shift


class Outside(nn.Module):
    """Runs a module that is in no tree, and refers to one that is elsewhere in it."""

    def __init__(self, other):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.hidden, self.seen = [nn.Linear(WIDTH, WIDTH)], (other,)
        for parameter in self.hidden[0].parameters():
            parameter.requires_grad_(False)

    def forward(self, x):
        return self.hidden[0](self.lin(x))


CONTAINERS = (Chain, Chain, Setting, Getting, Slotted, Data, nn.ModuleList, nn.ModuleDict,
              nn.Sequential)  # fmt: skip
LEAVES = (
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    lambda: nn.Linear(WIDTH, WIDTH),
    lambda: SlottedLinear(WIDTH, WIDTH),
    lambda: OwnLinear(WIDTH, WIDTH),
    lambda: nn.Conv1d(WIDTH, WIDTH, 1),
    lambda: nn.LayerNorm(WIDTH),
    lambda: nn.BatchNorm1d(WIDTH),
    lambda: nn.MultiheadAttention(WIDTH, 2),
    lambda: nn.GRU(WIDTH, WIDTH),
    lambda: nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0),
    lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    Matrix,
    nn.Identity,
)  # fmt: skip


def run(module, x):
    """A module of any kind, on (N, 4)."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.values() if isinstance(module, nn.ModuleDict) else module:
            x = torch.tanh(run(child, x))
        return x
    if isinstance(module, nn.Conv1d):
        return module(x[..., None])[..., 0]
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x)[0]
    result = module(x)
    return result[0] if isinstance(result, tuple) else result


def tree(random, depth=3):
    """A tree with some of its modules shared, its weights tied and its parameters frozen."""
    made, root = [], Chain()
    _fill(random, root, depth, made)
    linears = [m for m in made if type(m) is nn.Linear]
    if len(linears) > 1 and random.random() < 0.4:
        first, second = random.sample(linears, 2)
        second.weight = first.weight
    for parameter in root.parameters():
        if random.random() < 0.2:
            parameter.requires_grad_(False)
        elif random.random() < 0.2:
            parameter.grad = torch.ones_like(parameter)
    for module in root.modules():
        if random.random() < 0.2:
            module.eval()
        if isinstance(module, Setting):
            module.closed = True
    if made and random.random() < 0.3:
        random.choice(made).register_forward_hook(_look)
    return root


def _look(module, args, output):
    """A hook that changes nothing."""


def _fill(random, owner, depth, made):
    plain = isinstance(owner, nn.ModuleList | nn.Sequential)
    for i in range(random.randint(1, 3)):
        module = _module(random, depth, made)
        name = str(i) if plain else random.choice([n for n in NAMES if not hasattr(owner, n)])
        owner.add_module(name, module)


def _module(random, depth, made):
    if made and random.random() < 0.15:
        return random.choice(made)  # once more
    if depth and random.random() < 0.5:
        module = random.choice(CONTAINERS)()
        _fill(random, module, depth - 1, made)
        # Those that call their children as they are take what (N, 4) can be given to.
        if isinstance(module, nn.Sequential):
            module = _in_sequence(module)
    elif made and random.random() < 0.1:
        module = Outside(random.choice(made))
    else:
        module = random.choice(LEAVES)()
    made.append(module)
    return module


def _in_sequence(module):
    """A Sequential without what cannot be called on (N, 4) alone."""
    special = nn.ModuleList | nn.ModuleDict | nn.Conv1d | nn.MultiheadAttention | nn.GRU
    return nn.Sequential(*(m for m in module if not isinstance(m, special)))
