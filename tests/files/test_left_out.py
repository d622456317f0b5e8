"""What trains and is no adapter's is named when an adapter is saved, with a remedy that works."""

import warnings

import pytest
import torch
from helpers import ids
from stored_models import bare, trained
from torch import nn

from lora_inject import (
    LoRAInjectError,
    LoRAInjectWarning,
    freeze,
    inject,
    load,
    lora_parameters,
    lora_state_dict,
    save,
    use,
)

pytestmark = pytest.mark.usefixtures("device")
LEFT_OUT = r"2 parameters that train .* are not in {}: those of value.*\. freeze.*\['value'\]"


class Policy(nn.Module):
    """A backbone, which is adapted, and a head beside it."""

    def __init__(self):
        super().__init__()
        self.backbone = bare()
        self.value = nn.Linear(3, 1)

    def forward(self, x):
        return self.value(self.backbone(x))


def policy():
    torch.manual_seed(0)
    return Policy()


def head_beside():
    model = policy()
    inject(model.backbone, ["q_proj"], r=2)
    return model


def head_thawed():
    model = policy()
    inject(model, ["q_proj"], r=2)
    model.value.requires_grad_(True)
    return model


def head_replaced():
    model = policy()
    inject(model, ["q_proj"], r=2)
    model.value = nn.Linear(3, 1)
    return model


def steps(model, x):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(x)


@pytest.mark.parametrize("make", [head_beside, head_thawed, head_replaced])
def test_a_head_that_is_no_adapters_is_named_and_the_remedy_keeps_it(make, tmp_path):
    model, x = make(), ids()
    y = steps(model, x)
    if make is head_beside:
        with pytest.warns(LoRAInjectWarning, match=LEFT_OUT.format("the file")):
            save(model, tmp_path / "without")
        with pytest.warns(LoRAInjectWarning, match=LEFT_OUT.format("the state dict")):
            assert not any("value" in key for key in lora_state_dict(model))
    else:  # what inject has frozen would be lost
        with pytest.raises(LoRAInjectError, match=LEFT_OUT.format("the file")):
            save(model, tmp_path / "without")
        with pytest.raises(LoRAInjectError, match=LEFT_OUT.format("the state dict")):
            lora_state_dict(model)
        assert not (tmp_path / "without").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze(model, train_also=["value"])
        save(model, tmp_path / "with")
        assert "value.weight" in lora_state_dict(model)
    other = policy()
    load(other, tmp_path / "with")
    assert torch.equal(other(x), y)


def test_what_cannot_train_in_full_is_not_told_to(tmp_path):
    model = policy()
    inject(model, ["q_proj"], r=2)
    layer = model.backbone.layers[0].q_proj
    layer.weight.requires_grad_(True)  # the base of an adapted layer
    with pytest.raises(LoRAInjectError, match=r"1 parameter that .*q_proj, though") as said:
        save(model, tmp_path)
    assert "train_also" not in str(said.value)
    freeze(model)
    save(model, tmp_path)


def test_what_belongs_to_an_adapter_is_not_called_left_out(tmp_path):
    model = trained("all", train_also="head")
    save(model, tmp_path / "one")
    inject(model, ["o_proj"], r=2, adapter="fr")
    use(model, "fr", train=("fr", "default"))
    assert lora_parameters(model)
    save(model, tmp_path / "fr", adapter="fr")
    save(model, tmp_path / "default", adapter="default")
