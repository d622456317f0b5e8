"""The names and tensors of checkpoints are those that transformers saves, and lead back."""

import pytest
import torch
from families import llama, mixtral, qwen3_moe
from safetensors.torch import load_file
from torch import nn

from lora_inject.compat.conversions import (
    in_checkpoint,
    is_converted,
    names_in_checkpoint,
    names_in_model,
)

pytestmark = pytest.mark.cpu("it is about names")


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, llama])
def test_a_checkpoint_is_what_transformers_saves(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = in_checkpoint(model, model.state_dict())
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    assert is_converted(model) == (make is not llama)


def test_names_go_there_and_back():
    model = mixtral()
    there = names_in_checkpoint(model, model.state_dict())
    assert there["model.layers.0.mlp.gate.weight"] == "model.layers.0.block_sparse_moe.gate.weight"
    fused = "model.layers.0.mlp.experts.down_proj"
    assert there[fused] == fused  # which is divided, and not renamed alone
    back = names_in_model(model, there.values())
    assert {back[other] for other in there.values()} == set(there)
    expert = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert names_in_model(model, [expert]) == {expert: fused}


def test_a_model_of_no_library_has_the_names_of_its_checkpoint():
    model = nn.Sequential(nn.Linear(2, 2))
    values = model.state_dict()
    assert not is_converted(model)
    assert in_checkpoint(model, values) == dict(values)
    names = {name: name for name in values}
    assert names_in_checkpoint(model, values) == names_in_model(model, values) == names
