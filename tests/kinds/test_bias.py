"""Which parameters are biases."""

import pytest
import torch
from torch import nn

from lora_inject.kinds.bias import is_bias

pytestmark = pytest.mark.cpu("nothing is computed")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bias", True), ("in_proj_bias", True), ("bias_hh_l0_reverse", True), ("weight", False),
     ("biases", False), ("relative_position_bias_table", False), ("lora_A", False)],
)  # fmt: skip
def test_the_name_of_a_bias(name, expected):
    owner = nn.Module()
    owner.register_parameter(name, nn.Parameter(torch.zeros(3)))
    assert is_bias(owner, name) == expected


def test_a_matrix_is_a_bias_beside_its_weight_only():
    owner = nn.Module()
    owner.up_proj = nn.Parameter(torch.zeros(2, 3, 4))
    owner.up_proj_bias = nn.Parameter(torch.zeros(2, 3))
    owner.relative_attention_bias = nn.Parameter(torch.zeros(32, 8))
    assert is_bias(owner, "up_proj_bias")
    assert not is_bias(owner, "relative_attention_bias")
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert is_bias(attention, "bias_k")
