"""The role of every parameter."""

import pytest
from helpers import Net
from torch import nn

from lora_inject import inject
from lora_inject.core.look import Look
from lora_inject.core.roles import roles

pytestmark = pytest.mark.cpu("nothing is computed")


def test_every_parameter_has_one_role():
    model = Net()
    model.tied = nn.Linear(8, 11, bias=False)
    model.tied.weight = model.embed.weight
    inject(model, "q_proj", train_also="tied")
    role_of = roles(Look(model))
    assert list(role_of) == list(model.parameters())
    assert role_of[model.embed.weight] == "train_also"
    assert role_of[model.layers[0].q_proj.lora_A] == "lora_A"
    assert role_of[model.layers[0].norm.weight] == "other"
