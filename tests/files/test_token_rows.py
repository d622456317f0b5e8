"""Rows that resizing a vocabulary has drawn: in no file of an adapter, and said so."""

import json
import warnings

import pytest
import torch
from families import llama
from helpers import randomize_adapters

from lora_inject import LoRAInjectWarning, freeze, inject, load, save
from lora_inject.files.formats.storage import read_tensors

pytestmark = pytest.mark.usefixtures("device")
BOTH = ["model.embed_tokens", "lm_head"]


def resized(seed, rows=72):
    torch.manual_seed(0)
    model = llama()
    torch.manual_seed(seed)  # each process draws its own rows
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def adapted(**options):
    model = resized(1)
    inject(model, ["q_proj", "v_proj"], r=2, **options)
    randomize_adapters(model)
    return model


def outputs(model):
    return model(input_ids=torch.arange(60, 72)[None]).logits


def test_rows_that_were_drawn_anew_are_noticed_when_an_adapter_is_loaded(tmp_path):
    model = adapted()
    save(model, tmp_path)
    again = resized(2)
    with pytest.warns(LoRAInjectWarning, match="not what the adapter was trained over") as said:
        load(again, tmp_path)
    assert {str(w.message).split(".weight")[0] for w in said} == set(BOTH)
    assert not torch.equal(outputs(again), outputs(model))
    smaller = resized(1, rows=70)
    with pytest.warns(LoRAInjectWarning, match=r"70 rows, and had 72. Call resize_token_embedd"):
        load(smaller, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same, half = resized(1), resized(1).to(torch.bfloat16)
        load(same, tmp_path)
        load(half, tmp_path)
        load(resized(2), tmp_path, other_base=True)
    assert torch.equal(outputs(same), outputs(model))


@pytest.mark.parametrize("late", [False, True])
def test_rows_that_were_trained_are_in_the_file(late, tmp_path):
    """The remedy that the warning names, before training and just before saving."""
    model = adapted(**({} if late else {"train_also": BOTH}))
    if late:
        freeze(model, train_also=BOTH)
    again = resized(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, tmp_path)
        load(again, tmp_path)
    assert torch.equal(outputs(again), outputs(model))


def test_saving_says_it_where_the_checkpoint_is_at_hand(tmp_path):
    model = adapted()
    checkpoint = tmp_path / "base"
    checkpoint.mkdir()
    model.config._name_or_path = str(checkpoint)
    said = r"resized from 64 rows, and the new rows of model.embed_tokens, lm_head are not in the"
    for config in ({"vocab_size": 64}, {"text_config": {"vocab_size": 64}}):
        (checkpoint / "config.json").write_text(json.dumps(config))
        with pytest.warns(LoRAInjectWarning, match=said):
            save(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ('{"vocab_size": 72}', "{", "[]", "{}"):
            (checkpoint / "config.json").write_text(text)
            save(model, tmp_path / "a")
        (checkpoint / "config.json").write_text('{"vocab_size": 64}')
        freeze(model, train_also=BOTH)
        save(model, tmp_path / "b")
    tensors = read_tensors(tmp_path / "b" / "adapter_model.safetensors")[0]
    assert sum("embed_tokens" in key for key in tensors) == 1
