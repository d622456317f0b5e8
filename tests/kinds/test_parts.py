"""Fused projections: an adapter for each named part, as loralib's MergedLinear."""

import copy

import pytest
import torch
from families import FAMILIES
from helpers import Net, changed_parts, randomize_adapters, snapshot, train_steps
from torch import nn

from lora_inject import ArgumentError, NoMatchError, UnsupportedLayerError, inject, plan, strip

pytestmark = pytest.mark.usefixtures("device")

GQA = (("q", 8), (None, 4), ("v", 4))


def test_values_and_gradients_equal_those_of_the_written_out_weight():
    layer, x = nn.Linear(5, 16).double(), torch.randn(3, 5, dtype=torch.float64)
    base, expected = copy.deepcopy(layer), layer(x)
    inject(layer, nn.Linear, r=2, alpha=6, parts={nn.Linear: GQA})
    assert torch.equal(layer(x), expected)
    assert [n for n, _ in layer.named_parameters()][2:] == [
        "q_lora_A", "q_lora_B", "v_lora_A", "v_lora_B",
    ]  # fmt: skip
    assert layer.q_lora_B.shape == (8, 2)
    assert layer.v_lora_B.shape == (4, 2)
    randomize_adapters(layer)
    delta = torch.cat(
        [layer.q_lora_B @ layer.q_lora_A, torch.zeros(4, 5), layer.v_lora_B @ layer.v_lora_A]
    )
    reference = nn.functional.linear(x, base.weight + 3 * delta, base.bias)
    torch.testing.assert_close(layer(x), reference)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(layer(x).pow(2).sum(), parameters),
        torch.autograd.grad(reference.pow(2).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda *_: layer(x), parameters)


def test_equal_parts_agree_with_loralib():
    loralib = pytest.importorskip("loralib")
    theirs = loralib.MergedLinear(6, 12, r=2, lora_alpha=4, enable_lora=[True, False, True])
    nn.init.normal_(theirs.lora_B)
    ours = nn.Linear(6, 12)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora" not in k})
    inject(ours, nn.Linear, r=2, alpha=4, parts={nn.Linear: ("q", None, "v")})
    with torch.no_grad():
        for index, part in enumerate("qv"):
            rows, columns = slice(2 * index, 2 * index + 2), slice(4 * index, 4 * index + 4)
            getattr(ours, f"{part}_lora_A").copy_(theirs.lora_A[rows])
            getattr(ours, f"{part}_lora_B").copy_(theirs.lora_B[columns])
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_gpt2_with_adapters_on_query_and_value():
    family = FAMILIES["gpt2"]
    model, inputs = family.build(), family.inputs()
    before = snapshot(model)
    shown = inject(model, "c_attn", r=2, parts={"c_attn": ("q", None, "v")})
    assert shown.trainable == 2 * 2 * (2 * 16 + 2 * 16)
    assert "(q+v)" in str(plan(family.build(), "c_attn", parts={"c_attn": ("q", None, "v")}))
    train_steps(model, inputs, steps=2)
    trained = {n for n, p in model.named_parameters() if "lora_" in n and p.grad.any()}
    assert len(trained) == 2 * 4
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize(
    "parts",
    [3, "q", {"q_proj": "q"}, {"q_proj": ()}, {"q_proj": (None, None)}, {"q_proj": ("q", "q")},
     {"q_proj": ("q", 3)}, {"q_proj": (("q", 0),)}, {"q_proj": ("a.b", None)}],
)  # fmt: skip
def test_parts_that_are_none(parts):
    with pytest.raises(ArgumentError, match=r"^parts"):
        plan(Net(), "q_proj", parts=parts)


def test_parts_that_do_not_fit():
    for parts in (("a", "b", "c"), (("a", 3), ("b", 4)), (("a", 3), "b")):
        with pytest.raises(UnsupportedLayerError, match="do not divide 8 output features"):
            plan(Net(), "q_proj", parts={"q_proj": parts})
    for target in ("embed", "q_proj"):
        how = "weight" if target == "q_proj" else "auto"
        with pytest.raises(UnsupportedLayerError, match="parts= is for Linear layers"):
            plan(Net(), target, parts={target: ("a", "b")}, how=how)
    with pytest.raises(NoMatchError, match=r"^parts: 'v_proj' selects no layer"):
        plan(Net(), "q_proj", parts={"v_proj": ("a", None)})
    with pytest.raises(NoMatchError, match=r"^parts: 'c_atn' matches nothing"):
        plan(Net(), "q_proj", parts={"c_atn": ("a", None)})
