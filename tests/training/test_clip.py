"""The size of updates is held below a limit."""

import math

import pytest
import torch
from helpers import Net, randomize_adapters
from torch import nn

from lora_inject import clip_norms, disabled, inject, merge, use
from lora_inject.core.state import adapters_of


def size(layer):
    (adapter,) = adapters_of(layer)
    (pair,) = adapter.pairs
    own = pair.tensors(layer)
    W = layer._parameters["weight"]
    update = adapter.kind.update(layer, W, pair.spec, own["A"], own["B"])
    return (adapter.settings.scaling * update).norm().item()


def layers():
    torch.manual_seed(0)
    return nn.ModuleDict({
        "lin": nn.Linear(6, 5), "conv": nn.Conv2d(4, 6, 3, groups=2), "emb": nn.Embedding(9, 4)
    })  # fmt: skip


def test_what_is_larger_becomes_as_large_as_the_limit_in_its_own_direction():
    model = layers()
    inject(model, ["lin", "conv", "emb"], r=2, alpha=6)
    randomize_adapters(model)
    with torch.no_grad():
        model.lin.lora_B.mul_(1e-3)
    sizes = {name: size(layer) for name, layer in model.items()}
    small, before = model.lin.lora_A.clone(), model.conv.lora_B.clone()
    most = min(sizes["conv"], sizes["emb"]) / 2
    found = clip_norms(model, most)
    assert found == {
        f"{name}.weight (default)": pytest.approx(sizes[name], rel=1e-5) for name in ("conv", "emb")
    }
    assert size(model.conv) == pytest.approx(most, rel=1e-5)
    assert size(model.emb) == pytest.approx(most, rel=1e-5)
    torch.testing.assert_close(model.conv.lora_B, before * math.sqrt(most / sizes["conv"]))
    assert torch.equal(model.lin.lora_A, small)
    assert clip_norms(model, most * 1.001) == {}


def test_a_fixed_factor_stays_and_what_does_not_train_is_left_alone():
    model = nn.ModuleDict({"lin": nn.Linear(6, 5)})
    inject(model, "lin", r=2, fixed="A")
    randomize_adapters(model)
    A, before = model.lin.lora_A.clone(), size(model.lin)
    assert clip_norms(model, before / 3)
    assert torch.equal(model.lin.lora_A, A)
    assert size(model.lin) == pytest.approx(before / 3, rel=1e-5)
    use(model, "default", train=())
    assert clip_norms(model, before / 9) == {}


def test_parameters_stay_the_same_objects_and_parts_and_adapters_are_told_apart():
    model = Net()
    inject(model, "q_proj", r=2, parts={"q_proj": ("a", None)}, adapter="one")
    inject(model, "v_proj", r=2, adapter="two")
    use(model, "one", "two", train=("one", "two"))
    randomize_adapters(model)
    own = [id(p) for p in model.parameters()]
    found = clip_norms(model, 1e-6)
    assert "layers.0.q_proj.a (one)" in found
    assert "layers.1.v_proj.weight (two)" in found
    assert [id(p) for p in model.parameters()] == own


@pytest.mark.parametrize("method", [{"variant": "dora"}, {"init": "pissa"}], ids=str)
def test_what_is_no_product_alone_is_refused(method):
    model = Net()
    inject(model, "q_proj", r=2, **method)
    with pytest.raises(ValueError, match=r"layers.0.q_proj: .*no B A alone.*clip_grad_norm_"):
        clip_norms(model, 1.0)


def test_what_cannot_be_is_refused():
    model = Net()
    for most in (0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match="most must be a finite number above 0"):
            clip_norms(model, most)
    with pytest.raises(ValueError, match="no adapters"):
        clip_norms(model, 1.0)
    inject(model, "q_proj", r=2)
    with disabled(model), pytest.raises(ValueError, match="disabled"):
        clip_norms(model, 1.0)
    merge(model)
    with pytest.raises(ValueError, match="merged"):
        clip_norms(model, 1.0)
