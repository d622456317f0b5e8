"""Mixed precision: autocast in both 16-bit types, and loss scaling over a 16-bit base."""

import copy

import pytest
import torch
from families import FAMILIES
from helpers import randomize_adapters

from lora_inject import disabled, inject, lora_parameters, merged, strip

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def case(name, dtype=torch.float32):
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.build().to(dtype).eval()
    inputs = family.inputs()
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
@HALVES
def test_autocast_with_a_float32_base(name, half, device):
    model, inputs = case(name)
    model.requires_grad_(False)  # which alone makes torch round in another way in T5
    with torch.autocast(device.type, half):
        expected = model(**inputs)[0]
    inject(model, list(FAMILIES[name].targets), r=2)
    with torch.autocast(device.type, half):
        assert torch.equal(model(**inputs)[0], expected)
    randomize_adapters(model)
    exact = model(**inputs)[0]
    with torch.autocast(device.type, half):
        output = model(**inputs)[0]
        output.float().pow(2).mean().backward()
    assert output.dtype == expected.dtype
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.02)
    for parameter in lora_parameters(model):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@HALVES
def test_autocast_with_merged_and_disabled_adapters(half, device):
    model, inputs = case("llama")
    with torch.autocast(device.type, half):
        base = model(**inputs).logits
    inject(model, ["q_proj", "v_proj"], r=2)
    randomize_adapters(model)
    with torch.autocast(device.type, half):
        on = model(**inputs).logits
    with merged(model), torch.autocast(device.type, half):
        torch.testing.assert_close(model(**inputs).logits, on, rtol=0.1, atol=0.02)
    with disabled(model), torch.autocast(device.type, half):
        assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("name", ["llama", "vit"])
@pytest.mark.parametrize("autocast", [True, False])
def test_loss_scaling_works_over_a_float16_base_with_default_adapters(name, autocast, device):
    model, inputs = case(name, torch.float16)
    inject(model, list(FAMILIES[name].targets), r=2)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.02)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=4)
    losses = []
    for _ in range(8):
        with torch.autocast(device.type, torch.float16, enabled=autocast):
            output = model(**inputs)[0].float()
        loss = (output - 0.1).pow(2).mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # which refuses float16 gradients
        torch.nn.utils.clip_grad_norm_(lora_parameters(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert scaler.get_scale() == 2.0**12  # it grew twice and never had to fall
    state = model.state_dict()
    assert [k for k, v in before.items() if not torch.equal(v, state[k])] == []


def test_adapters_in_the_dtype_of_a_float16_base_are_what_loss_scaling_refuses(device):
    model, inputs = case("llama", torch.float16)
    inject(model, ["q_proj"], r=2, dtype="base")
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(model(**inputs).logits.float().mean()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_an_overflow_leaves_the_adapters_and_the_base_as_they_were(device):
    model, inputs = case("llama", torch.float16)
    inject(model, ["q_proj", "v_proj"], r=2)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.02)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    scaler.scale(model(**inputs).logits.float().pow(2).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**59
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    strip(model)
