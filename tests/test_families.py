"""Real families from small configs: injected, trained, compared with peft, stripped."""

import copy

import peft
import pytest
import torch
from families import FAMILIES
from helpers import PEFT_WARNS, changed_parts, randomize_adapters, snapshot, train_steps

from lora_inject import LoRALayer, inject, plan, strip

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(params=list(FAMILIES))
def family(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]


def test_inject_train_strip(family):
    model, inputs = family.build(), family.inputs()
    before = snapshot(model)
    inject(model, list(family.targets), r=2, dropout=0.1, bias="lora_only")
    train_steps(model, inputs)
    model.eval()  # without the noise of dropout
    first = train_steps(model, inputs, steps=1)
    assert train_steps(model, inputs, steps=10) < first
    for module in model.modules():
        if isinstance(module, LoRALayer):
            assert module.lora_B.any()
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_step_zero_is_bit_equal(family, dtype):
    model, inputs = family.build().to(dtype).eval(), family.inputs()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs)[0]
        inject(model, "all-linear", r=2)
        assert torch.equal(model(**inputs)[0], expected)
    assert expected.dtype == dtype


def test_all_linear_finds_every_linear_but_the_head(family):
    assert len(plan(family.build(), "all-linear").sites) == family.linears


def test_two_forwards_of_a_model_in_eval_mode_are_equal_with_dropout(family):
    model, inputs = family.build().eval(), family.inputs()
    inject(model, "all-linear", r=2, dropout=0.5)
    randomize_adapters(model)
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])


@PEFT_WARNS
def test_outputs_and_gradients_equal_those_of_peft(family):
    base, inputs, targets = family.build().eval(), family.inputs(), list(family.targets)
    model = copy.deepcopy(base)
    inject(model, targets, r=3, alpha=6)
    randomize_adapters(model)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=3, lora_alpha=6))
    pairs = []
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALayer):
            theirs = wrapped.base_model.model.get_submodule(path)
            A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            pairs += [(layer.lora_A, A), (layer.lora_B, B)]
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours)
    wrapped.eval()
    one, other = model(**inputs)[0], wrapped(**inputs)[0]
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    one.pow(2).sum().backward()
    other.pow(2).sum().backward()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
