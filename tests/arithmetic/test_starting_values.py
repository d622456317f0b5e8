"""Starting values: one of A and B is zero, and the values depend on seed and path alone."""

import math

import pytest
import torch
from helpers import Net

from lora_inject import inject, reset_lora_parameters

pytestmark = pytest.mark.usefixtures("device")


def values(model, path):
    layer = model.get_submodule(path)
    return layer.lora_A.detach().clone(), layer.lora_B.detach().clone()


def test_linear_starts_with_a_kaiming_uniform_A_and_a_zero_B():
    model = Net(dim=64)
    inject(model, "q_proj", r=32)
    A, B = values(model, "layers.0.q_proj")
    bound = 1 / math.sqrt(64)
    assert not B.any()
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_embedding_starts_with_a_zero_A_and_a_normal_B():
    model = Net(dim=64)
    inject(model, "embed", r=32)
    A, B = values(model, "embed")
    assert not A.any()
    assert B.std().item() == pytest.approx(1, rel=0.1)


def test_values_depend_neither_on_other_targets_nor_on_what_was_drawn_before():
    one, other = Net(), Net()
    inject(one, ["v_proj"], seed=3)
    torch.rand(7)
    inject(other, ["q_proj", "v_proj", "embed"], seed=3)
    for path in ("layers.0.v_proj", "layers.1.v_proj"):
        assert torch.equal(values(one, path)[0], values(other, path)[0])
    assert not torch.equal(values(one, "layers.0.v_proj")[0], values(one, "layers.1.v_proj")[0])


def test_values_depend_on_seed_and_adapter():
    made = []
    for arguments in ({"seed": 1}, {"seed": 2}, {"seed": 1, "adapter": "fr"}):
        model = Net()
        inject(model, "head", **arguments)
        made.append(next(p for n, p in model.named_parameters() if "lora_A" in n))
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_seed_leaves_the_global_generator_alone_and_no_seed_takes_one_draw():
    model = Net()
    state = torch.get_rng_state()
    inject(model, "q_proj", seed=0)
    assert torch.equal(torch.get_rng_state(), state)

    firsts = []
    for targets in (["q_proj"], ["q_proj", "v_proj", "embed"]):
        model = Net()
        torch.manual_seed(5)
        inject(model, targets)
        firsts.append((values(model, "layers.0.q_proj")[0], torch.rand(1)))
    assert torch.equal(firsts[0][0], firsts[1][0])
    assert torch.equal(firsts[0][1], firsts[1][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_the_same_in_every_dtype_but_for_rounding(dtype):
    reference, model = Net(), Net(dtype=dtype)
    inject(reference, "q_proj", seed=1)
    inject(model, "q_proj", seed=1, dtype=dtype)
    expected = values(reference, "layers.1.q_proj")[0].to(dtype)
    assert torch.equal(values(model, "layers.1.q_proj")[0], expected)


def test_a_model_built_on_meta_gets_the_eager_values(device):
    eager = Net()
    with torch.device("meta"):
        model = Net()
    for each in (eager, model):
        inject(each, ["q_proj", "embed"], r=2, bias="all", train_also="head", seed=4)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=device)
    base = {k: v for k, v in eager.state_dict().items() if "lora_" not in k}
    assert set(model.load_state_dict(base, strict=False).missing_keys) == {
        k for k in eager.state_dict() if "lora_" in k
    }
    reset_lora_parameters(model)
    for (name, expected), (other, value) in zip(
        eager.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(expected, value)
