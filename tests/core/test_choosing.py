"""Which of the places are kept: blocks by number, and heads that all-linear leaves."""

import pytest
from torch import nn

from lora_inject import ArgumentError, plan

pytestmark = pytest.mark.usefixtures("device")


def test_layers_by_number_where_numbers_are_not_contiguous():
    model = nn.ModuleDict({"10": nn.Linear(4, 4), "20": nn.Linear(4, 4)})
    assert [site.path for site in plan(model, nn.Linear, layers=-1).sites] == ["20"]
    assert [site.path for site in plan(model, nn.Linear, layers=10).sites] == ["10"]
    with pytest.raises(ArgumentError, match=r"layers=\[8\]"):
        plan(model, nn.Linear, layers=8)


def test_a_method_of_another_meaning_is_not_asked_for_the_head():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def get_output_embeddings(self, which):
            return which

    assert plan(Odd(), "all-linear").sites


def test_heads_of_other_families():
    import transformers as tf

    config = tf.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=24,
    )  # fmt: skip
    model = tf.BertForPreTraining(config)
    assert not any(site.path.startswith("cls.") for site in plan(model, "all-linear").sites)
