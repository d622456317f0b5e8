"""A start that is the user's own function."""

import pytest
import torch
from every_kind import KINDS, make
from helpers import changed_parts, linears, snapshot
from torch import nn

from lora_inject import ArgumentError, inject, reset_lora_parameters, strip
from lora_inject.starts import Subtracted

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted"),
]


def orthogonal(W, A, B):
    nn.init.orthogonal_(A)
    B.zero_()


def both(W, A, B):
    nn.init.normal_(A)
    nn.init.normal_(B)


@pytest.mark.parametrize("kind", KINDS)
def test_any_function_and_no_output_changes(kind):
    torch.manual_seed(0)
    layer, call, arguments = make(kind)
    expected = call(layer.requires_grad_(False))
    for init in (orthogonal, Subtracted(both)):
        inject(layer, **arguments, init=init)
        assert torch.equal(call(layer), expected)
        strip(layer)


def test_it_writes_what_the_adapter_starts_with():
    model = linears("a", "b")
    state = torch.get_rng_state()
    inject(model, {"a": {"r": 2, "init": orthogonal}, "b": {"r": 2}}, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    A = model["a"].lora_A
    torch.testing.assert_close(A @ A.T, torch.eye(2, device=A.device))
    first = A.detach().clone()
    strip(model)
    inject(model, "a", r=2, init=orthogonal, seed=3)
    assert torch.equal(model["a"].lora_A, first)  # whatever else is adapted
    with torch.no_grad():
        model["a"].lora_A.zero_()
    reset_lora_parameters(model)
    assert torch.equal(model["a"].lora_A, first)


def test_it_sees_the_weight():
    model, seen = linears("a"), []
    inject(model, "a", r=2, init=lambda W, A, B: seen.append(W))
    assert torch.equal(seen[0], model["a"].weight)


def test_what_would_move_outputs_is_refused_and_nothing_changes():
    model = linears("a", "b")
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"^init: .*both not zero.*Subtracted"):
        inject(model, ["a", "b"], r=2, init=both)
    with pytest.raises(ArgumentError, match=r"^init: .* not finite"):
        inject(model, ["a", "b"], r=2, init=lambda W, A, B: A.fill_(float("nan")))
    with pytest.raises(ArgumentError, match=r"^init must be one of"):
        inject(model, ["a", "b"], r=2, init=3)
    assert changed_parts(before, snapshot(model)) == []
