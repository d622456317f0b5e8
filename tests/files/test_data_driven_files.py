"""Starts from data in files: PEFT's EVA and CorDA directories load exactly, and PEFT reads ours."""

import copy

import peft
import pytest
import torch
from helpers import PEFT_WARNS
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from stored_models import peft_loads
from torch import nn

from lora_inject import allocate, calibrate, inject, load, save, strip
from lora_inject.core.state import adapters_of
from lora_inject.starts import EVA, CorDA, LoftQ, LoRAGA

pytestmark = [PEFT_WARNS, pytest.mark.cpu("files")]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(10, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Apart(nn.Module):
    """Two layers, of which one reads few directions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x):
        return self.a(x) * self.b(x * 0.4 ** torch.arange(12))


def batches():
    return [torch.randn(40, 12) * torch.arange(1, 13) for _ in range(3)]


def trained(model, marks):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(mark in name for mark in marks):
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_eva_loads_exactly(rslora, tmp_path):
    base, data = Apart(), batches()
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules=["a", "b"], init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0), use_rslora=rslora,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    peft.initialize_lora_eva_weights(
        theirs,
        [{"x": x} for x in data],
        forward_fn=lambda model, batch: model(batch["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, name, prepared: x[0] if isinstance(x, tuple) else x,
        show_progress_bar=False,
    )
    trained(theirs, ["lora_"])
    theirs.save_pretrained(tmp_path)
    ours = load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(ours(data[0]), theirs.eval()(data[0]), rtol=1e-6, atol=1e-6)
    ranks = {adapters_of(layer)[0].settings.r for layer in (ours.a, ours.b)}
    assert len(ranks) == 2  # PEFT has redistributed them
    assert torch.equal(strip(ours)(data[0]), base(data[0]))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_peft_corda_converted_loads_exactly(method, tmp_path):
    base, data = Two(), batches()
    moved = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["a", "b"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip
    preprocess_corda(moved, config, run_model=lambda: [moved(x) for x in data])
    theirs = peft.get_peft_model(moved, config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    trained(theirs, ["lora_"])
    theirs.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours = load(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(ours(data[0]), theirs.eval()(data[0]), rtol=1e-5, atol=1e-5)
    assert torch.equal(strip(ours)(data[0]), base(data[0]))


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga", "loftq", "function"])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_peft_computes_what_we_save_and_it_comes_back(start, scaling, tmp_path):
    base, data = Two(), batches()
    stats = calibrate(
        base, ["a", "b"], data, gradients=True, loss=lambda y, _: y.square().mean(), progress=False
    )
    original = copy.deepcopy(base)
    trained(original, ["weight"])
    init = {
        "eva": EVA(stats), "corda": CorDA(stats), "lora_ga": LoRAGA(stats),
        "loftq": LoftQ(original), "function": lambda W, A, B: nn.init.orthogonal_(A),
    }[start]  # fmt: skip
    model = copy.deepcopy(base)
    inject(model, allocate(stats, r=3, scaling=scaling), init=init)
    trained(model, ["lora_A", "lora_B"])
    save(model, tmp_path / "a")
    output = model(data[0])
    theirs = peft_loads(base, tmp_path / "a")(data[0])
    torch.testing.assert_close(theirs, output, rtol=1e-4, atol=1e-4)
    again = load(copy.deepcopy(base), tmp_path / "a")
    torch.testing.assert_close(again(data[0]), output, rtol=1e-6, atol=1e-6)
    for one, other in ((model.a, again.a), (model.b, again.b)):
        assert adapters_of(one)[0].settings.r == adapters_of(other)[0].settings.r
        assert {n for n, p in one.named_parameters() if p.requires_grad} == {
            n for n, p in other.named_parameters() if p.requires_grad
        }
