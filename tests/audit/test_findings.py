"""Every code is found where it is provoked in a real model, and not where it is not."""

import contextlib
import copy
import functools
import types
from dataclasses import dataclass, field

import pytest
import torch
import transformers as tf
from families import FAMILIES, bert, gpt2, llama, mixtral
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_inject import (
    audit,
    inject,
    load,
    lora_parameters,
    param_groups,
    save,
    strip,
    use,
)
from lora_inject.audit.codes import CODES

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BREAKS = {}


@dataclass
class Scene:
    """A model that trains, and what it is audited with."""

    model: nn.Module
    batch: object = field(default_factory=FAMILIES["llama"].inputs)
    loss: object = None
    optimizer: object = None

    def audit(self):
        return audit(self.model, self.batch, loss=self.loss, optimizer=self.optimizer)

    def optimized(self, kind=torch.optim.AdamW, lr=1e-3, **options):
        self.optimizer = kind(param_groups(self.model, lr, **options))
        return self

    def trained(self, steps=3):
        self.optimized()
        for _ in range(steps):
            self.model(**self.batch, labels=self.batch["input_ids"]).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def sound(build=llama, targets=TARGETS, **options):
    model = build()
    inject(model, targets, r=2, **options)
    return Scene(model)


def breaks(code, make=sound):
    def known(break_):
        BREAKS[code] = make, break_
        return break_

    return known


def mlp(scene):
    return scene.model.model.layers[0].mlp


def q_proj(scene):
    return scene.model.model.layers[0].self_attn.q_proj


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:.*:lora_inject.errors.LoRAInjectWarning")
@pytest.mark.parametrize("code", CODES)
def test_a_code_is_found_where_it_is_and_not_where_it_is_not(code):
    make, break_ = BREAKS[code]
    scene = make()
    assert code not in scene.audit().codes
    broken = break_(scene) or scene
    with unchanged(broken.model):
        found = broken.audit()
    assert code in found.codes, found
    assert all(name in str(found) for name in found.codes)


@contextlib.contextmanager
def unchanged(model):
    """Everything that a snapshot has, and random numbers; tensors on meta have no values."""
    on_meta = any(p.is_meta for p in model.parameters())
    before, numbers = None if on_meta else snapshot(model), torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), numbers)
    assert on_meta or changed_parts(before, snapshot(model)) == []


def test_every_code_is_provoked():
    assert BREAKS.keys() == CODES.keys()


# --- what adapters there are --------------------------------------------------------------------


@breaks("no-adapter")
def _(scene):
    strip(scene.model)


@breaks("asleep")
def _(scene):
    inject(scene.model, ["q_proj"], r=2, adapter="b")
    use(scene.model, "default", train=["default", "b"])


class Averaged(nn.Module):
    """As a module of Lightning holds a model and an average of it."""

    def __init__(self, model, copied):
        super().__init__()
        self.model, self.average = model, copied

    def forward(self, **inputs):
        return self.model(**inputs)


def averaged():
    scene = sound()
    return Scene(Averaged(scene.model, copy.deepcopy(scene.model)))


@breaks("copy-without", averaged)
def _(scene):
    scene.model.average = llama().requires_grad_(False)


@breaks("left-alone", lambda: sound(targets="all-linear"))
def _(scene):
    return sound(mixtral, "all-linear")


@breaks("replaced")
def _(scene):
    scene.model.model.layers[0].self_attn.q_proj = nn.Linear(16, 16, bias=False)


@breaks("came")
def _(scene):
    mlp(scene).gate = nn.Linear(16, 16)


@breaks("class-changed")
def _(scene):
    q_proj(scene).__class__ = nn.Linear


@breaks("forward-changed")
def _(scene):
    layer = q_proj(scene)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight), layer)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loaded():
    scene = sound()
    randomize_adapters(scene.model, 0.01)
    save(scene.model, "adapter")
    base = strip(scene.model)
    load(base, "adapter")
    return Scene(base)


@breaks("other-base", loaded)
def _(scene):
    model = llama()
    load(model, "adapter", other_base=True)
    return Scene(model)


def on_top():
    scene = sound()
    randomize_adapters(scene.model, 0.01)
    inject(scene.model, ["q_proj"], r=2, adapter="top")
    use(scene.model, "default", "top", train=["top"])
    randomize_adapters(scene.model, 0.01, ["top"])
    return scene


@breaks("missing-beside", on_top)
def _(scene):
    save(scene.model, "top", adapter="top")
    load(strip(scene.model), "top", adapter="top")


# --- A and B ------------------------------------------------------------------------------------


@breaks("dead")
def _(scene):
    nn.init.zeros_(q_proj(scene).lora_A)


@breaks("unmoved", lambda: sound().trained())
def _(scene):
    nn.init.zeros_(q_proj(scene).lora_B)


def standing():
    scene = sound()
    scene.batch = None
    return scene


@breaks("on-meta", standing)
def _(scene):
    layer = q_proj(scene)
    layer.lora_A = nn.Parameter(layer.lora_A.to("meta"))


@breaks("device-apart", standing)
def _(scene):
    layer = q_proj(scene)
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)


@breaks("fp16-trains")
def _(scene):
    return sound(dtype=torch.float16)


# --- what trains --------------------------------------------------------------------------------


@breaks("nothing-trains")
def _(scene):
    scene.model.requires_grad_(False)


@breaks("thawed")
def _(scene):
    scene.model.lm_head.requires_grad_(True)


@breaks("frozen")
def _(scene):
    q_proj(scene).lora_B.requires_grad_(False)


@breaks("stale-gradient")
def _(scene):
    q_proj(scene).weight.grad = torch.zeros(16, 16)


def evaluated():
    scene = sound()
    scene.model.eval()
    return scene


@breaks("part-in-training", evaluated)
def _(scene):
    scene.model.model.layers[1].train()


# --- the optimizer ------------------------------------------------------------------------------


@breaks("not-optimized", lambda: sound().optimized())
def _(scene):
    inject(scene.model, ["o_proj"], r=2, adapter="b")
    use(scene.model, "default", "b")


@breaks("optimized-frozen", lambda: sound().optimized())
def _(scene):
    scene.optimizer.add_param_group({"params": [scene.model.lm_head.weight]})


@breaks("optimized-elsewhere", lambda: sound().optimized())
def _(scene):
    inject(strip(scene.model), TARGETS, r=2)


@breaks("optimized-twice", lambda: sound().optimized())
def _(scene):
    first, second = scene.optimizer.param_groups[:2]
    second["params"].append(first["params"][0])


def with_biases():
    scene = sound(gpt2, ["c_attn"], bias="lora_only", variant="dora")
    return scene.optimized(weight_decay=0.01)


@breaks("decayed", with_biases)
def _(scene):
    scene.optimizer = torch.optim.AdamW(lora_parameters(scene.model), 1e-3, weight_decay=0.01)


def in_16_bits():
    return sound(lambda: llama().bfloat16(), dtype="base").optimized(lr=0.1)


@breaks("step-lost", in_16_bits)
def _(scene):
    scene.optimized(lr=1e-5)


# --- the forward pass ---------------------------------------------------------------------------


@breaks("never-ran")
def _(scene):
    mlp(scene).forward = lambda x: x


def compiled_early():
    """A block that was compiled before inject, by a setting that spares it every look at it."""
    model = llama().requires_grad_(False)
    inputs = FAMILIES["llama"].inputs()
    guards = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    model.model.layers[0].mlp.compile(backend="eager", options=guards)
    model(**inputs)
    inject(model, ["q_proj"], r=2)
    return Scene(model, inputs)


@breaks("bypassed")
def _(scene):
    """As a hook does that has kept the forward of the layer's own class."""
    layer = mlp(scene).up_proj
    layer.forward = types.MethodType(nn.Linear.forward, layer)


@breaks("compiled-without", compiled_early)
def _(scene):
    inject(scene.model, ["up_proj"], r=2)


@breaks("other-weight")
def _(scene):
    def swap(layer, _):
        layer._parameters["weight"] = nn.Parameter(torch.randn(16, 16), requires_grad=False)

    q_proj(scene).register_forward_pre_hook(swap)


def reading(self, x):
    """As a fused kernel does: the weights of layers without calling them."""
    up = F.linear(x, self.up_proj.weight.to(x.dtype))
    return F.linear(self.act_fn(self.gate_proj(x)) * up, self.down_proj.weight)


def minding(self, x):
    """As careful code does, which asks a weight for its type and shape and reads no value."""
    W = self.up_proj.weight
    zeros = torch.zeros_like(W) @ W.new_zeros(W.shape[1], 1)
    x = x.to(W).type_as(self.down_proj.weight.data) + zeros.sum().to(W.dtype)
    return type(self).forward(self, x.to(self.down_proj.weight.device))


def minded():
    scene = sound()
    mlp(scene).forward = types.MethodType(minding, mlp(scene))
    return scene


@breaks("read-outside", minded)
def _(scene):
    mlp(scene).forward = types.MethodType(reading, mlp(scene))


@breaks("tied-apart", lambda: sound(gpt2, ["wte"]))
def _(scene):
    return sound(gpt2, ["wte"], exclude=["lm_head"])


@breaks("not-finite")
def _(scene):
    scene.model.model.layers[1].input_layernorm.weight.data[0] = torch.nan


@breaks("update-large", lambda: sound().trained())
def _(scene):
    randomize_adapters(scene.model, 10)


def tiny(scale):
    def make():
        scene = sound(lambda: llama().bfloat16())
        randomize_adapters(scene.model, scale)
        return scene

    return make


@breaks("update-lost", tiny(0.02))
def _(scene):
    return tiny(1e-5)()


@breaks("rank-unused")
def _(scene):
    q_proj(scene).lora_A.data[1] = q_proj(scene).lora_A.data[0]


def resnet():
    config = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return tf.ResNetForImageClassification(config)


def images():
    scene = sound(resnet, ["convolution"])
    scene.batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return scene


@breaks("statistics-move", images)
def _(scene):
    norm = next(m for m in scene.model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.track_running_stats = True


def test_a_buffer_that_is_replaced_moves_too():
    scene = images()
    norm = next(m for m in scene.model.modules() if isinstance(m, nn.BatchNorm2d))

    def average(layer, _):
        layer.running_mean = layer.running_mean * 0.9

    assert scene.audit().clean
    norm.register_forward_pre_hook(average)
    with unchanged(scene.model):
        (found,) = scene.audit().findings
    assert (found.code, found.path.endswith("running_mean")) == ("statistics-move", True)


@breaks("parameter-written")
def _(scene):
    def clip(layer, _):
        with torch.no_grad():
            layer.weight.clamp_(-1e3, 1e3)

    scene.model.model.embed_tokens.register_forward_pre_hook(clip)


@breaks("dropout-in-eval", evaluated)
def _(scene):
    layer = mlp(scene)
    layer.forward = lambda x: F.dropout(type(layer).forward(layer, x), 0.1)


# --- the backward pass --------------------------------------------------------------------------


@breaks("loss-detached")
def _(scene):
    scene.loss = lambda output, _: output.logits.detach().mean()


@breaks("loss-apart")
def _(scene):
    own = lora_parameters(scene.model)
    scene.loss = lambda *_: sum(p.square().sum() for p in own)


@breaks("no-gradient")
def _(scene):
    q_proj(scene).register_forward_hook(lambda *args: args[-1].detach())


def test_what_trains_in_place_is_named_where_no_gradient_comes():
    scene = sound(bert, ["query"], train_also=["pooler"])
    assert scene.audit().clean
    scene.loss = lambda output, _: output.last_hidden_state[..., 0].square().mean()
    assert [(found.code, found.path) for found in scene.audit().findings] == [
        ("no-gradient", "pooler.dense.weight"),
        ("no-gradient", "pooler.dense.bias"),
    ]


@breaks("under-no-grad")
def _(scene):
    layer = mlp(scene)
    layer.forward = torch.no_grad()(functools.partial(type(layer).forward, layer))


@breaks("checkpoint-cut")
def _(scene):
    first = scene.model.model.layers[0]
    former = functools.partial(type(first).forward, first)
    first.forward = lambda x, **others: checkpoint(
        functools.partial(former, **others), x, use_reentrant=True
    )


@breaks("zero-gradient")
def _(scene):
    q_proj(scene).register_forward_hook(lambda *args: args[-1] * 0)


@breaks("gradient-not-finite")
def _(scene):
    scene.loss = lambda output, _: (output.logits * 0).abs().sqrt().sum()


@breaks("adapters-changed")
def _(scene):
    inject(scene.model, ["q_proj"], r=2, adapter="b")
    randomize_adapters(scene.model, 0.01)

    def loss(output, batch):
        use(scene.model, "b")
        other = scene.model(**batch).logits
        return (output.logits - other).square().mean()

    scene.loss = loss


@breaks("graph-early")
def _(scene):
    scene.model.enable_input_require_grads()
