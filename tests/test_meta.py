"""Real models that are built on the meta device become those that are built the eager way."""

import pytest
import torch
import transformers as tf
from families import FAMILIES
from helpers import Net, train_steps

from lora_inject import inject, plan, report, reset_lora_parameters, strip


def build(name, device):
    torch.manual_seed(0)
    with torch.device(device):
        return FAMILIES[name].build()


def materialized(model, eager, device):
    """What a user does: memory, the base weights, the buffers that no checkpoint holds, ties."""
    model.to_empty(device=device)
    base = {key: value for key, value in eager.state_dict().items() if "lora_" not in key}
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert all("lora_" in key for key in missing)
    assert unexpected == []
    buffers = dict(eager.named_buffers())
    for key, buffer in model.named_buffers():
        buffer.copy_(buffers[key])
    model.tie_weights()
    reset_lora_parameters(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_from_meta_or_eagerly_it_is_the_same_model(name, device):
    family = FAMILIES[name]
    eager, model = build(name, device).train(), build(name, "meta").train()
    asked = {"targets": [*family.targets], "r": 2, "bias": "lora_only", "seed": 5}
    if name == "gpt2":  # whose head is tied to its embedding
        asked["targets"].append("wte")
    assert str(plan(model, **asked)) == str(plan(eager, **asked))
    shown = inject(model, **asked)
    assert str(shown) == str(inject(eager, **asked))
    assert all(parameter.is_meta for parameter in model.parameters())
    materialized(model, eager, device)
    assert str(report(model)) == str(shown)
    expected, state = eager.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert [key for key, value in state.items() if not torch.equal(value, expected[key])] == []

    inputs = family.inputs()
    for each in (model, eager):
        torch.manual_seed(1)
        train_steps(each, inputs)
    expected, state = eager.state_dict(), model.state_dict()
    assert [key for key, value in state.items() if not torch.equal(value, expected[key])] == []
    for each in (model, eager):
        strip(each)
    expected, state = eager.state_dict(), model.state_dict()
    assert [key for key, value in state.items() if not torch.equal(value, expected[key])] == []


@pytest.mark.cpu("nothing is computed")
def test_a_model_that_is_far_too_large_is_planned_injected_and_reported_on_meta():
    config = tf.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, vocab_size=128256,
        num_attention_heads=128, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    shown = inject(model, ["q_proj", "v_proj"], r=16)
    # Per layer: A of q and v, B of q, and B of v, which has 8 heads of 128.
    assert shown.trainable == 126 * 16 * (2 * 16384 + 16384 + 1024)
    assert shown.frozen > 405e9
    strip(model)
    assert report(model).trainable == shown.frozen


def emptied(**options):
    """A model that was adapted on meta and got room and base weights, and no call of reset."""
    torch.manual_seed(0)
    base = Net()
    with torch.device("meta"):
        model = Net()
    inject(model, ["q_proj", "v_proj"], r=2, seed=3, **options)
    model.to_empty(device=next(base.parameters()).device)
    model.load_state_dict(base.state_dict(), strict=False)
    return model, base


def test_without_reset_adapters_start_where_room_was_made(device):
    model, base = emptied()
    x = torch.arange(10).view(2, 5)
    assert torch.equal(model(x), base(x))
    inject(base, ["q_proj", "v_proj"], r=2, seed=3)
    expected = base.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"variant": "dora"}, {"init": "pissa"}])
def test_what_starts_from_the_weight_is_no_number_until_reset(options, device):
    model, base = emptied(**options)
    x = torch.arange(10).view(2, 5)
    assert model(x).isnan().any()
    reset_lora_parameters(model)
    torch.testing.assert_close(model(x), base(x))


def test_moving_and_casting_keep_values(device):
    model, _ = emptied()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    model.half().float()
    assert all((p == 0.5).all() for p in model.parameters())
