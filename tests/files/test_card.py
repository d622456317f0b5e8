"""A saved directory has a model card, which says what the adapter is and how to load it."""

import re

import pytest
import transformers as tf
import yaml
from helpers import ids
from stored_models import bare, trained
from torch import nn

from lora_inject import inject, load, save
from lora_inject.files.convert import convert
from lora_inject.files.formats.card import CARD

pytestmark = pytest.mark.cpu("it is about files")


def head_and_facts(folder):
    """The metadata for the hub, and the table."""
    text = (folder / CARD).read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), dict(re.findall(r"^\| (.+?) \| (.+?) \|$", body, re.MULTILINE))


def small_llama(name):
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=9,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    model.config._name_or_path = name
    return model


def test_the_card_says_what_was_trained_of_what(tmp_path):
    model = small_llama("meta/llama")
    shown = inject(model, {"q_proj": {"r": 2}, "v_proj": {"r": 4}}, alpha=8, train_also="lm_head")
    save(model, tmp_path / "mine")
    head, facts = head_and_facts(tmp_path / "mine")
    assert head == {
        "base_model": "meta/llama", "library_name": "peft", "tags": ["lora", "lora_inject"],
    }  # fmt: skip
    assert facts["targets"] == "`q_proj`, `v_proj`"
    assert (facts["adapted"], facts["rank"], facts["alpha"]) == ("4 layers", "2, 4", "8")
    assert facts["trained in full"] == "`lm_head`"
    assert facts["trained parameters"].startswith(f"{shown.trainable:,}, ")
    text = (tmp_path / "mine" / CARD).read_text()
    assert "`meta/llama` (LlamaForCausalLM)" in text


def test_what_the_card_says_to_call_works(tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tmp_path)
    save(trained(), tmp_path / "mine")
    ours, theirs = re.findall(r"```python\n(.*?)```", (tmp_path / "mine" / CARD).read_text(), re.S)
    space = {"model": bare()}
    exec(ours, space)
    x = ids()
    expected = trained()(x)
    assert (space["model"](x) == expected).all()
    space = {"model": bare().eval()}
    exec(theirs, space)
    assert isinstance(space["model"], peft.PeftModel)


@pytest.mark.parametrize("options", [{"init": "pissa"}, {"fixed": "A"}, {"variant": "dora"}])
def test_the_card_counts_what_trains(options, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    shown = inject(model, "0", r=2, alpha=4, **options)
    save(model, tmp_path)
    head, facts = head_and_facts(tmp_path)
    assert "base_model" not in head  # nothing tells it
    assert facts["trained parameters"].startswith(f"{shown.trainable}, ")
    assert (facts["rank"], facts["alpha"]) == ("2", "4")


def test_a_card_of_ones_own_stays(tmp_path):
    save(trained(), tmp_path / "a")
    ours = (tmp_path / "a" / CARD).read_text()
    (tmp_path / "a" / CARD).write_text("mine")
    save(trained(), tmp_path / "a")
    assert (tmp_path / "a" / CARD).read_text() == "mine"
    (tmp_path / "a" / CARD).write_text(ours + "changed")
    save(trained(), tmp_path / "a")
    assert (tmp_path / "a" / CARD).read_text() == ours
    (tmp_path / "a" / CARD).write_bytes(b"\xff\xfe")
    save(trained(), tmp_path / "a")
    assert (tmp_path / "a" / CARD).read_bytes() == b"\xff\xfe"


def test_diffusers_directories_and_converted_ones_have_one(tmp_path):
    save(trained(), tmp_path / "a", format="diffusers")
    head, _ = head_and_facts(tmp_path / "a")
    assert head["library_name"] == "diffusers"
    convert(tmp_path / "a", tmp_path / "b", "peft")
    head, facts = head_and_facts(tmp_path / "b")
    assert head["library_name"] == "peft"
    assert facts["rank"] == "2"
    load(bare(), tmp_path / "b")
