"""A new head that stays frozen and random is said in a report's first lines, with the remedy."""

import pytest
import transformers as tf
from helpers import PEFT_WARNS
from torch import nn

from lora_inject import LoRAInjectWarning, freeze, inject, load, report, save, strip

pytestmark = pytest.mark.cpu("it is about flags and names")

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 30,
}  # fmt: skip
BERT = tf.BertConfig(**SMALL)
ROBERTA = tf.RobertaConfig(**SMALL, pad_token_id=0)
GPT2 = tf.GPT2Config(
    n_embd=8, n_head=2, n_layer=1, vocab_size=9, bos_token_id=0, eos_token_id=0, pad_token_id=0
)
# By a class with a new head: its backbone, the path of the head, and what to adapt.
NEW_HEADS = {
    tf.BertForSequenceClassification: (tf.BertModel(BERT), "classifier", "query"),
    tf.BertForQuestionAnswering: (tf.BertModel(BERT), "qa_outputs", "query"),
    tf.RobertaForSequenceClassification: (tf.RobertaModel(ROBERTA), "classifier", "query"),
    tf.GPT2ForSequenceClassification: (tf.GPT2Model(GPT2), "score", "c_attn"),
}


@pytest.fixture(params=NEW_HEADS, ids=lambda cls: cls.__name__)
def with_new_head(request, tmp_path):
    backbone, head, target = NEW_HEADS[request.param]
    backbone.save_pretrained(tmp_path / "backbone")
    return request.param.from_pretrained(tmp_path / "backbone"), head, target


def first_lines(shown):
    return " ".join(str(shown).split("\n\n")[0].split())


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("all_linear", [True, False])
def test_a_head_that_was_in_no_checkpoint_is_said_first(with_new_head, all_linear):
    model, head, target = with_new_head
    shown = inject(model, "all-linear" if all_linear else target, r=2)
    assert f"{head} was not in the checkpoint that the model came from" in first_lines(shown)
    assert f"inject(..., train_also=['{head}'])" in first_lines(shown)
    assert first_lines(report(model)) == first_lines(shown)
    assert shown.to_dict()["alerts"] == list(shown.alerts)
    shown = freeze(model, train_also=[head])  # the one remedy
    assert not shown.alerts
    assert all(p.requires_grad for p in model.get_submodule(head).parameters())
    strip(model)
    assert not report(model).alerts  # all of it trains
    assert not inject(model, target, r=2, train_also=[head]).alerts  # and the other


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_was_in_the_checkpoint_is_nothing_to_say(tmp_path):
    tf.BertForSequenceClassification(BERT).save_pretrained(tmp_path / "whole")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert not inject(model, r=2).alerts
    save(model, tmp_path / "adapter")
    load(strip(model), tmp_path / "adapter")
    assert not report(model).alerts
    model.classifier = nn.Linear(16, 5).requires_grad_(False)  # by hand, which is as new
    assert "classifier was not in the checkpoint" in report(model).alerts[0]


@pytest.mark.filterwarnings("ignore")
def test_language_models_with_tied_and_with_own_heads_are_nothing_to_say(tmp_path):
    for tied in (True, False):
        config = tf.LlamaConfig(**SMALL, tie_word_embeddings=tied)
        model = tf.LlamaForCausalLM(config)
        assert not inject(model, r=2).alerts
        tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
        loaded.resize_token_embeddings(40)
        assert not inject(loaded, r=2).alerts


def test_where_nothing_tells_what_is_new_the_output_head_may_be():
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    shown = inject(model, r=1)
    said = "classifier is taken for the output head and frozen; where it is new it would stay"
    assert said in first_lines(shown)
    strip(model)
    assert not inject(model, "layer", r=1).alerts  # a choice of one's own
    strip(model)
    assert not inject(model, r=1, train_also="classifier").alerts


@PEFT_WARNS
def test_tensors_of_other_adapters_are_not_taken_for_new_parts(tmp_path):
    import peft

    tf.BertModel(BERT).save_pretrained(tmp_path / "bert")
    model = tf.BertModel.from_pretrained(tmp_path / "bert")
    inject(model, "query", r=2)
    inject(model, "query", r=2, adapter="fr")
    assert not report(model).alerts
    strip(model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["value"])).base_model.model
    with pytest.warns(LoRAInjectWarning, match="PEFT"):
        assert not inject(theirs, "query", r=2).alerts
