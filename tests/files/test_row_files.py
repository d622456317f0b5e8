"""Trainable rows in files: what we write PEFT computes, and what PEFT writes we compute."""

import copy
import json

import peft
import pytest
import torch
import transformers as tf
from helpers import PEFT_WARNS
from safetensors.torch import load_file
from stored_models import SAFE, Tied, peft_loads
from torch import nn

from lora_inject import (
    FormatError,
    inject,
    load,
    load_lora_state_dict,
    lora_state_dict,
    save,
    strip,
)
from lora_inject.core.state import adapters_of
from lora_inject.files.convert import convert, inspect

TOKENS = torch.arange(20).reshape(2, 10)
PREFIX = "base_model.model."
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
both_ties = pytest.mark.parametrize("tied", [True, False])


def llama(tied, dtype=torch.float32):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).to(dtype).eval()


def moved(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def adapted(tied, targets, rows, **more):
    model = llama(tied)
    inject(model, targets, r=2, rows=rows, **more)
    return moved(model)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@PEFT_WARNS  # that tied layers of its TRAINABLE_TOKENS are adapted apart
@both_ties
@pytest.mark.parametrize("targets", [["q_proj"], ()])
@pytest.mark.parametrize(
    "rows", [{"embed_tokens": [7, 3]}, {"lm_head": [2, 5]}, {"embed_tokens": [3], "lm_head": [3]}]
)
def test_peft_computes_what_we_save_and_it_comes_back(rows, targets, tied, tmp_path):
    model = adapted(tied, targets, rows)
    expected = logits(model)
    save(model, tmp_path / "a")
    if targets:
        theirs = peft_loads(llama(tied), tmp_path / "a")
    else:
        theirs = peft.PeftModel.from_pretrained(llama(tied), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), expected, **CLOSE)
    again = llama(tied)
    load(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), expected, **CLOSE)
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (again, model)]
    assert trains[0] == trains[1] or tied  # of tied places the file's first leads
    moved(model)
    load(model, tmp_path / "a")  # into the adapter that is there
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    strip(again)
    assert torch.equal(logits(again), logits(llama(tied)))


@PEFT_WARNS
@both_ties
@pytest.mark.parametrize(
    "ids", [[7, 3, 5], {"embed_tokens": [7, 3]}, {"model.embed_tokens": [7], "lm_head": [7]},
            {"lm_head": [9, 1, 4]}]
)  # fmt: skip
def test_peft_directories_with_trainable_tokens_load(ids, tied, tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=ids, init_lora_weights=False
    )
    theirs = moved(peft.get_peft_model(llama(tied), config).eval())
    theirs.save_pretrained(tmp_path / "a")
    model = llama(tied)
    load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    save(model, tmp_path / "b")
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(llama(tied), tmp_path / "b")), logits(theirs), **CLOSE
    )
    strip(model)
    assert torch.equal(logits(model), logits(llama(tied)))


@PEFT_WARNS
@both_ties
def test_peft_directories_of_trainable_tokens_alone_load(tied, tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[7, 3], target_modules=["embed_tokens"])
    theirs = moved(peft.get_peft_model(llama(tied), config).eval())
    theirs.save_pretrained(tmp_path / "a")
    model = llama(tied)
    load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    assert adapters_of(model.lm_head) == () or tied


def test_a_file_holds_the_rows_and_no_difference(tmp_path):
    model = adapted(False, ["q_proj"], {"embed_tokens": [7, 3]})
    save(model, tmp_path / "a")
    own = load_file(tmp_path / "a" / SAFE)
    rows = own[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"]
    table = strip(model, merge=True).model.embed_tokens.weight
    assert torch.equal(rows, table[[3, 7]])
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 7]}


def test_rows_over_sixteen_bits_come_back(tmp_path):
    model = llama(True, torch.bfloat16)
    inject(model, (), rows={"embed_tokens": [7, 3]})
    moved(model)
    save(model, tmp_path / "a")
    again = llama(True, torch.bfloat16)
    load(again, tmp_path / "a")
    rows = model.model.embed_tokens.lora_rows
    assert again.model.embed_tokens.lora_rows.dtype is torch.float32
    torch.testing.assert_close(again.model.embed_tokens.lora_rows, rows, **CLOSE)
    torch.testing.assert_close(logits(again), logits(model))


class Biased(nn.Module):
    """A head with a bias, and an embedding, of a model that has no config."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mid, self.head = nn.Embedding(20, 4), nn.Linear(4, 4), nn.Linear(4, 20)

    def forward(self, tokens):
        return self.head(torch.tanh(self.mid(self.emb(tokens))))


@PEFT_WARNS
def test_a_head_with_a_bias_is_refused_since_peft_drops_it(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["mid"], trainable_token_indices={"head": [5]})
    theirs = peft.get_peft_model(Biased(), config)
    ours, bias = Biased(), Biased().head.bias
    torch.testing.assert_close(theirs(TOKENS) + bias, ours(TOKENS), **CLOSE)  # the fault
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(FormatError, match="head: has a bias, which PEFT leaves out"):
        load(ours, tmp_path / "a")
    inject(ours, "mid", r=2, rows={"head": [5]})
    with pytest.raises(FormatError, match="head has a bias, which PEFT leaves out"):
        save(ours, tmp_path / "b")


@PEFT_WARNS
def test_biases_beside_rows_are_where_peft_has_them(tmp_path):
    def build():
        model = Biased()
        model.emb.register_parameter("bias", nn.Parameter(torch.zeros(4)))
        return model

    model = build()
    inject(model, "mid", r=2, rows={"emb": [5]}, bias="all")
    moved(model)
    save(model, tmp_path / "a")
    theirs, again = peft.PeftModel.from_pretrained(build(), tmp_path / "a"), build()
    load(again, tmp_path / "a")
    for other in (theirs, again):
        torch.testing.assert_close(other(TOKENS), model(TOKENS), **CLOSE)
    assert torch.equal(theirs.base_model.model.emb.token_adapter.base_layer.bias, model.emb.bias)
    assert torch.equal(again.emb.bias, model.emb.bias)


def test_what_a_format_has_no_word_for_is_refused(tmp_path):
    model = adapted(False, ["q_proj"], {"embed_tokens": [3]})
    for arguments in ({"format": "loralib"}, {"format": "kohya"}, {"format": "diffusers"},
                      {"portable": True}):  # fmt: skip
        with pytest.raises(FormatError, match=r"model.embed_tokens has rows that train.*no word"):
            save(model, tmp_path / "a", **arguments)
    several = adapted(False, (), {"embed_tokens": [3], "lm_head": [4]})
    with pytest.raises(FormatError, match="one list of ids for all layers, and here are 2"):
        save(several, tmp_path / "a")
    with_norm = adapted(False, (), {"embed_tokens": [3]}, train_also="norm")
    with pytest.raises(FormatError, match=r"rows and nothing else, and model\.norm\.weight was"):
        save(with_norm, tmp_path / "a")
    plain = Tied()
    inject(plain, (), rows={"emb": [3]})
    with pytest.raises(FormatError, match="emb is tied, which its model has no config to tell"):
        save(plain, tmp_path / "a")
    half = llama(True)
    inject(half, (), rows={"embed_tokens": [3]}, exclude="lm_head")
    with pytest.raises(FormatError, match="embed_tokens is tied to lm_head, of which PEFT would"):
        save(half, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def changed(folder, target, config=None, tensors=None):
    """A copy of a directory with other words in its config, without our mark, or other tensors."""
    from safetensors.torch import save_file

    target.mkdir()
    words = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**words, **(config or {})}))
    own = {**load_file(folder / SAFE), **(tensors or {})}
    save_file({key: tensor for key, tensor in own.items() if tensor is not None}, target / SAFE)
    return target


def test_files_that_do_not_fit_are_refused(tmp_path):
    save(adapted(False, ["q_proj"], {"embed_tokens": [3, 7]}), tmp_path / "a")
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    cases = [
        ({"trainable_token_indices": {"embed_tokens": [3]}}, {}, r"\(2, 8\), for 1 ids"),
        ({"trainable_token_indices": {"embed_tokens": [3, 3]}}, {}, "some with 3 in it twice"),
        ({"trainable_token_indices": {"wte": [3, 7]}}, {}, "must be ids of rows"),
        ({"trainable_token_indices": {"embed_tokens": [3, 70]}}, {}, "up to the id 70.*20, 8"),
        ({"trainable_token_indices": None}, {}, "must be ids of rows"),
        ({}, {key: None}, "tells of trainable tokens, and there are none"),
        ({}, {key: torch.zeros(2, 5)}, "rows of 5 features"),
        ({}, {key: torch.zeros(2, 8, dtype=torch.int32)}, "no plain tensor"),
        ({}, {key: torch.full((2, 8), torch.nan)}, "not finite"),
        ({}, {key.replace("embed_tokens", "wte"): torch.zeros(2, 8)}, "wte"),
    ]
    model = llama(False)
    for i, (config, tensors, message) in enumerate(cases):
        with pytest.raises(FormatError, match=message):
            load(model, changed(tmp_path / "a", tmp_path / str(i), config, tensors))
    other = adapted(False, ["q_proj"], {"embed_tokens": [3, 8]})
    before = logits(other)
    with pytest.raises(FormatError, match=r"embed_tokens: the file has 2 rows.*has others"):
        load(other, tmp_path / "a")
    assert torch.equal(logits(other), before)


def test_tied_rows_that_differ_in_a_file_are_refused(tmp_path):
    save(adapted(True, ["q_proj"], {"embed_tokens": [3]}), tmp_path / "a")
    key = f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"
    with pytest.raises(FormatError, match="tied in this model and have different rows"):
        load(llama(True), changed(tmp_path / "a", tmp_path / "b", {}, {key: torch.zeros(1, 8)}))


def test_state_dicts_fill_the_rows_of_tied_places():
    tokens, model = torch.tensor([[1, 2]]), Tied()
    inject(model, (), rows={"emb": [2, 5]})
    moved(model)
    state = {key: tensor.clone() for key, tensor in lora_state_dict(model).items()}
    assert state.keys() == {"emb.lora_rows", "head.lora_rows"}
    expected = model(tokens)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.emb.lora_rows.zero_()
    load_lora_state_dict(other, state)
    assert torch.equal(other(tokens), expected)
    with pytest.raises(FormatError, match="tied in this model and have different adapters"):
        load_lora_state_dict(other, {**state, "head.lora_rows": torch.zeros(2, 4)})


def test_a_directory_tells_of_its_rows(tmp_path):
    save(adapted(False, ["q_proj"], {"embed_tokens": [7, 3]}), tmp_path / "a")
    shown = inspect(tmp_path / "a")
    assert shown.to_dict()["rows"] == {"model.embed_tokens": [3, 7]}
    assert "3..7" in str(shown)
    convert(tmp_path / "a", tmp_path / "b", "peft")
    model = llama(False)
    load(model, tmp_path / "b")
    assert model.model.embed_tokens.lora_rows.shape == (2, 8)
    with pytest.raises(FormatError, match=r"model\.embed_tokens has rows that train"):
        convert(tmp_path / "a", tmp_path / "c", "peft", portable=True)
