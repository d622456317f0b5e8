"""Gradient checkpointing: with everything before the adapters frozen, all of them get gradients."""

import copy
import importlib
import io

import pytest
import torch
import transformers as tf
from families import FAMILIES, llama, unet, vit
from helpers import (
    HOOKS_OUTSIDE,
    changed_parts,
    checkpoint_blocks,
    ids,
    randomize_adapters,
    snapshot,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    NoMatchError,
    disabled,
    inject,
    load,
    lora_parameters,
    merged,
    reentrant_checkpointing,
    remove,
    save,
    strip,
)
from lora_inject.changes.checkpointing import is_checkpointed

pytestmark = pytest.mark.usefixtures("device")

REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


def gradients(model, inputs):
    """The gradient of every A and B after one step on fixed inputs and with fixed dropout."""
    torch.manual_seed(1)
    model(**inputs)[0].float().pow(2).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(got, expected):
    assert [name for name, gradient in got.items() if gradient is None] == []
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "vit"])
@REENTRANT
def test_every_adapter_gets_the_gradient_that_it_gets_without_checkpointing(family, reentrant):
    gets_the_same_gradients(family, reentrant)


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=HOOKS_OUTSIDE), False])
def test_so_does_every_one_in_a_model_without_token_ids(reentrant):
    gets_the_same_gradients("vit", reentrant)


def gets_the_same_gradients(family, reentrant):
    build = FAMILIES[family]
    model, inputs = build.build().double().train(), build.inputs()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    inject(model, list(build.targets), r=2)
    randomize_adapters(model)
    plain = gradients(model, {**inputs, **({"use_cache": False} if "input_ids" in inputs else {})})
    checkpoint_blocks(model, reentrant)
    assert_same_gradients(gradients(model, inputs), plain)


@REENTRANT
def test_so_do_adapters_over_inputs_that_skip_the_embedding(reentrant):
    model = llama().double().train()
    inject(model, ["q_proj", "v_proj"], r=2, layers=[-1])
    randomize_adapters(model)
    inputs = {"inputs_embeds": torch.randn(2, 5, 16, dtype=torch.double), "use_cache": False}
    plain = gradients(model, inputs)
    checkpoint_blocks(model, reentrant)
    assert_same_gradients(gradients(model, inputs), plain)
    assert inputs["inputs_embeds"].requires_grad is False


def test_so_do_those_of_diffusers():
    model = unet().double().train()
    inject(model, ["to_q", "to_v", "conv1"], r=2)
    randomize_adapters(model)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, dtype=torch.double), "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(2, 3, 8, dtype=torch.double),
    }  # fmt: skip
    plain = gradients(model, inputs)
    for function in (None, lambda block, *args: checkpoint(block, *args, use_reentrant=True)):
        model.enable_gradient_checkpointing(function)
        assert_same_gradients(gradients(model, inputs), plain)


@REENTRANT
def test_dropout_of_the_adapter_is_drawn_again_as_it_was(reentrant):
    model, inputs = llama().double().train(), {"input_ids": ids(), "use_cache": False}
    inject(model, ["q_proj", "v_proj"], r=2, dropout=0.5)
    randomize_adapters(model)
    plain = gradients(model, inputs)
    checkpoint_blocks(model, reentrant)
    assert_same_gradients(gradients(model, inputs), plain)


@HOOKS_OUTSIDE
def test_adapters_in_the_weight_too():
    class Block(tf.modeling_layers.GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = nn.Sequential(Block(), Block()).double()
    inject(model, ["attention", "out_proj"], r=2)
    randomize_adapters(model)
    inputs = {"input": torch.randn(2, 5, 8, dtype=torch.double)}
    plain = gradients(model, inputs)
    for block in model:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = lambda f, *args: checkpoint(
            f, *args, use_reentrant=True
        )
    assert_same_gradients(gradients(model, inputs), plain)


def hooks(model):
    return [name for name, module in model.named_modules() if module._forward_pre_hooks]


def test_strip_removes_the_hooks_and_no_others(tmp_path):
    model = vit()
    model.vit.layers[0].register_forward_pre_hook(lambda module, args: None)
    before = snapshot(model)
    inject(model, ["q_proj"], r=2)
    assert hooks(model) == [p for p, m in model.named_modules() if is_checkpointed(m)]
    assert len(model.vit.layers[0]._forward_pre_hooks) == 2
    once = [list(m._forward_pre_hooks) for m in model.modules()]
    inject(model, ["v_proj"], r=2, adapter="fr")
    assert [list(m._forward_pre_hooks) for m in model.modules()] == once
    remove(model, "fr")
    save(model, tmp_path / "adapter")
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    load(model, tmp_path / "adapter")
    assert hooks(model)
    remove(model, "default")
    assert changed_parts(before, snapshot(model)) == []


def test_an_injection_that_fails_leaves_the_hooks_as_they_were(monkeypatch):
    plan = importlib.import_module("lora_inject.plan")

    def fails(*_):
        raise RuntimeError("late")

    model = vit()
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "report_of", fails)
        with pytest.raises(RuntimeError, match="late"):
            inject(model, ["q_proj"], r=2)
    assert changed_parts(before, snapshot(model)) == []
    inject(model, ["q_proj"], r=2)
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "report_of", fails)
        with pytest.raises(RuntimeError, match="late"):
            inject(model, ["v_proj"], r=2, adapter="fr")
    assert changed_parts(before, snapshot(model)) == []


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@HOOKS_OUTSIDE
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_train_and_are_stripped_as_well(copied):
    model = vit().train()
    inject(model, ["q_proj"], r=2)
    randomize_adapters(model)
    twin = copied(model)
    checkpoint_blocks(twin, True)
    found = gradients(twin, {"pixel_values": torch.randn(2, 3, 8, 8)})
    assert None not in found.values()
    checkpoint_blocks(twin)
    strip(twin)
    assert hooks(twin) == []
    assert hooks(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # and none should have
def test_no_output_changes_and_nothing_needs_a_gradient_that_did_not():
    model, pixels = vit().eval(), torch.randn(2, 3, 8, 8)
    base = model(pixels).logits
    inject(model, ["q_proj"], r=2, layers=[-1])
    seen = []
    model.vit.layers[0].register_forward_hook(lambda m, args, y: seen.append(y.requires_grad))
    assert torch.equal(model(pixels).logits, base)
    model.train()
    model(pixels)
    checkpoint_blocks(model, True)
    assert torch.equal(model(pixels).logits, base)  # nothing in this model drops out
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, base)
    with disabled(model):
        assert torch.equal(model(pixels).logits, base)
    with merged(model):
        assert torch.equal(model(pixels).logits, base)
    assert seen == [False] * 6  # the block without adapters costs no graph


# --- a model of one's own -----------------------------------------------------------------------


class Own(nn.Module):
    """What checkpoints its blocks in the reentrant form, and has no switch that says so."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x


def own():
    model = Own().train()
    before = snapshot(model)
    inject(model, nn.Linear, r=2)
    randomize_adapters(model)
    return model, before


@HOOKS_OUTSIDE
def test_in_a_model_of_ones_own_the_module_before_the_blocks_is_named():
    model, before = own()
    x = torch.tensor([[1, 2, 3]])
    y = model.blocks[1](model.blocks[0](model.embed(x)))
    assert reentrant_checkpointing(reentrant_checkpointing(model, after="embed"), "embed") is model
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert all(p.grad is not None for p in lora_parameters(model))
    assert model.embed.weight.grad is None
    assert not model.eval().embed(x).requires_grad
    strip(copy.deepcopy(model))
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_what_is_no_module_before_a_block_is_refused():
    model, _ = own()
    with pytest.raises(NoMatchError, match="after: 'emb'"):
        reentrant_checkpointing(model, after="emb")
    with pytest.raises(ArgumentError, match="after: name the module"):
        reentrant_checkpointing(model, after=())
    with pytest.raises(LoRAInjectError, match="no adapters"):
        reentrant_checkpointing(Own(), after="embed")
