"""Which of the places are kept: blocks by number, and heads that all-linear leaves."""

import pytest
from torch import nn

from lora_inject import ArgumentError, UnsupportedLayerError, inject, plan

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


def test_what_an_earlier_pattern_has_chosen_is_not_asked_of_later_ones():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    plan(model, {"out_proj": {"dropout": 0.0}, nn.Linear: {"dropout": 0.1}}, r=1)
    with pytest.raises(UnsupportedLayerError, match=r"dropout=0\.1"):
        plan(model, {nn.Linear: {"dropout": 0.1}, "out_proj": {"dropout": 0.0}}, r=1)


def test_blocks_that_stand_twice_in_a_list_count_twice():
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleList([block, nn.Sequential(nn.Linear(4, 4)), block])
    assert [site.path for site in plan(model, nn.Linear, r=1, layers=-1).sites] == ["0.0"]
    assert [site.path for site in plan(model, nn.Linear, r=1, layers=1).sites] == ["1.0"]


def test_what_is_tied_to_a_layer_that_trains_in_full_is_not_adapted():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["emb"].weight
    model["fc"] = nn.Linear(3, 3)
    inject(model, "fc", r=1, adapter="a", train_also="emb")
    for target in ("emb", "head"):
        with pytest.raises(UnsupportedLayerError, match=r"emb: .*trains it in full"):
            plan(model, target, r=1, adapter="b")
