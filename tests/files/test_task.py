"""PEFT's word for the task: AutoPeftModel opens what we save as what it was."""

import json

import peft
import pytest
import torch
import transformers as tf

from lora_inject import inject, load, save

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "vocab_size": 32}  # fmt: skip
T5 = tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                 decoder_start_token_id=0)  # fmt: skip
CASES = {
    "SEQ_CLS": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)), "query",
                ["classifier"], peft.AutoPeftModelForSequenceClassification),
    "TOKEN_CLS": (lambda: tf.BertForTokenClassification(tf.BertConfig(**SIZES)), "query",
                  ["classifier"], peft.AutoPeftModelForTokenClassification),
    "QUESTION_ANS": (lambda: tf.BertForQuestionAnswering(tf.BertConfig(**SIZES)), "query",
                     ["qa_outputs"], peft.AutoPeftModelForQuestionAnswering),
    "SEQ_2_SEQ_LM": (lambda: tf.T5ForConditionalGeneration(T5), "q", [],
                     peft.AutoPeftModelForSeq2SeqLM),
    "CAUSAL_LM": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), "q_proj", [],
                  peft.AutoPeftModelForCausalLM),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", CASES)
def test_auto_peft_model_opens_it(task, tmp_path):
    torch.manual_seed(0)
    build, targets, also, auto = CASES[task]
    model = build().eval()
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    inject(model, targets, r=2, train_also=also)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == task
    theirs = auto.from_pretrained(str(tmp_path / "a")).eval()
    ids = {"input_ids": torch.tensor([[3, 5, 7]])}
    if task == "SEQ_2_SEQ_LM":
        ids["decoder_input_ids"] = ids["input_ids"]
    torch.testing.assert_close(theirs(**ids)[0], model(**ids)[0], rtol=1e-4, atol=1e-5)


def test_without_its_head_in_the_adapter_the_word_is_left_out(tmp_path):
    model = CASES["SEQ_CLS"][0]()
    inject(model, "query", r=2)
    save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] is None


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_peft_knows_by_its_class_gets_no_task(tmp_path):
    model = CASES["SEQ_2_SEQ_LM"][0]()
    model.save_pretrained(tmp_path / "base")
    theirs = type(model).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q"])  # without a task: PEFT says the class
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "base")
    load(again, tmp_path / "a")
    save(again, tmp_path / "b")
    said = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert said["task_type"] is None
    assert said["auto_mapping"]["base_model_class"] == "T5ForConditionalGeneration"
    peft.AutoPeftModel.from_pretrained(str(tmp_path / "b"))
