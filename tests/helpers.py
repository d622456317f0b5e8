"""What several test modules use: snapshots, training steps, small models."""

import importlib

import pytest
import torch
import transformers as tf
from hypothesis import settings
from torch import nn

from lora_inject.changes.edits import run
from lora_inject.core.state import adapters_of

PEFT_WARNS = pytest.mark.filterwarnings("ignore")  # of deprecations in transformers, as an oracle


def examples(share):
    """How many a slow test tries: its share of the default, or what ``--examples`` says."""
    default = settings.default
    return int(share * default.max_examples) if default.derandomize else default.max_examples


def snapshot(model):
    """Everything that strip promises to restore, in a form that ``==`` can compare."""
    return {
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "training": [(name, m.training) for name, m in model.named_modules()],
        "parameters": [
            (name, id(p), p.requires_grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "order": [
            (name, list(m._parameters), list(m._buffers)) for name, m in model.named_modules()
        ],
        "gradients": [
            (name, None if p.grad is None else (id(p.grad), raw(p.grad)))
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [
            (name, id(b), raw(b)) for name, b in model.named_buffers(remove_duplicate=False)
        ],
        "state": [(name, t.dtype, raw(t)) for name, t in model.state_dict().items()],
        "attributes": [
            (name, sorted(vars(m)), plain(m)) for name, m in model.named_modules()
        ],
        "hooks": [
            (name, [[(k, id(hook)) for k, hook in hooks.items()] for hooks in hook_dicts(m)])
            for name, m in model.named_modules()
        ],
    }  # fmt: skip


def raw(tensor):
    """The bytes of a tensor: unlike ==, they tell -0.0 from 0.0 and NaNs apart."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def plain(module):
    """Attributes of simple types by value."""
    simple = (int, float, str, bool, type(None))
    return [(k, v) for k, v in vars(module).items() if isinstance(v, simple)]


def hook_dicts(module):
    return [v for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict)]


def changed_parts(before, after):
    """The names of the parts in which two snapshots differ."""
    return [part for part in before if before[part] != after[part]]


class Faults:
    """Inside, what a commit changes fails at one step, counted over all commits.

    Args:
        at: the number of edits that go well.
        error: what is raised before the next one.
        undo: how many steps of taking the edits back fail too.
    """

    def __init__(self, at, error=RuntimeError, undo=0):
        self.left, self.error, self.undo, self.raised = at, error, undo, False

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for module in (
            "core.commit",
            "core.lend",
            "training.freeze",
            "files.stored",
            "files.loading",
        ):
            module = importlib.import_module(f"lora_inject.{module}")
            self.patch.setattr(module, "run", self.run)
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def run(self, edits, then=None):
        wrapped = [(self.wrapped(put), *rest) for put, *rest in edits]
        return run(wrapped, then and (lambda: self.step() or then()))

    def wrapped(self, put):
        def failing(*args):
            self.step()
            put(*args)

        return failing

    def step(self):
        if self.raised:
            self.undo -= 1
            if self.undo >= 0:
                raise self.error("undo fails")
            return
        self.left -= 1
        if self.left < 0:
            self.raised = True
            raise self.error("no")


def randomize_adapters(model, scale=0.1, names=None):
    """Give every A and B values that matter, in use or not; or those of these adapters alone."""
    with torch.no_grad():
        for module in model.modules():
            for adapter in adapters_of(module):
                if names is None or adapter.name in names:
                    for name in adapter.parameters:
                        module.get_parameter(name).normal_(std=scale)


def paired(adapter):
    """Every pair of an adapter: its spec, and the names of A and B."""
    return [(pair.spec, tuple(pair.names.values())) for pair in adapter.pairs]


def train_steps(model, inputs, steps=3, lr=0.02):
    """Adam on everything that trains, towards a fixed target; returns the last loss."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        output = model(inputs) if not isinstance(inputs, dict) else model(**inputs)
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        target = torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape)
        loss = (tensor.float() - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# What transformers calls it: "gradient" up to 5.17, "activation" later.
_RENAMED = hasattr(tf.PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"


# Earlier versions call the hooks of a block inside of its checkpoint, where ours comes too late.
# With token ids transformers has a hook of its own on the embedding; others get torch's warning.
HOOKS_OUTSIDE = pytest.mark.skipif(
    "__call__" in vars(tf.modeling_layers.GradientCheckpointingLayer),
    reason="this version of transformers calls the hooks of a block inside of its checkpoint",
)


def checkpoint_blocks(model, reentrant=None):
    """Switch the checkpointing of transformers on, in one of its two forms, or off."""
    if reentrant is None:
        getattr(model, f"{CHECKPOINTING}_disable")()
    else:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def linears(*names):
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})


class Block(nn.Module):
    def __init__(self, dim, dtype=None):
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, dtype=dtype)
        self.k_proj = nn.Linear(dim, dim, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(dim, 2 * dim, dtype=dtype)
        self.o_proj = nn.Linear(2 * dim, dim, dtype=dtype)
        self.norm = nn.LayerNorm(dim, dtype=dtype)

    def forward(self, x):
        gate = torch.sigmoid(self.q_proj(x) * self.k_proj(x))
        return self.norm(x + gate * self.o_proj(self.v_proj(x)))


class Net(nn.Module):
    """Two blocks of attention-like layers between an embedding and a head."""

    def __init__(self, dim=8, dtype=None):
        super().__init__()
        self.embed = nn.Embedding(11, dim, dtype=dtype)
        self.layers = nn.ModuleList([Block(dim, dtype), Block(dim, dtype)])
        self.head = nn.Linear(dim, 3, dtype=dtype)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def ids(rows=2, columns=5, vocabulary=11):
    return torch.randint(vocabulary, (rows, columns))


def quantize(model, config):
    """Quantize all Linear layers of a model by torchao."""
    torchao = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    configs = {
        "int8": torchao.Int8WeightOnlyConfig(),
        # torchao's packed Int4WeightOnlyConfig needs CUDA or mslk; this one runs on any CPU.
        "int4": torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity.PerGroup(8)
        ),
    }
    torchao.quantize_(model, configs[config])
