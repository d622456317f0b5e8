"""A vocabulary may be resized under adapters: new rows have a delta of zero, and all goes on."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from helpers import randomize_adapters

from lora_inject import (
    UnsupportedLayerError,
    disabled,
    inject,
    load,
    lora_parameters,
    merge,
    save,
    strip,
    unmerge,
    use,
)
from lora_inject.core.drift import drift
from lora_inject.core.look import Look

ROWS, MORE = 32, 40
X = torch.arange(12).view(2, 6)
pytestmark = pytest.mark.filterwarnings("ignore:.*mean_resizing")


def llama(tied=False):
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def adapted(tied=False, targets=("embed_tokens", "lm_head", "q_proj"), **options):
    model = llama(tied)
    targets = [t for t in targets if not (tied and t == "lm_head")]
    inject(model, targets, r=2, **options)
    randomize_adapters(model)
    return model


def no_drift(model):
    kinds = ("gone", "came", "thawed", "frozen", "class", "forward")
    return drift(Look(model), *kinds) == []


@pytest.mark.parametrize(("tied", "options"), [(False, {}), (True, {}), (False, {"init": "pissa"})])
def test_old_rows_keep_their_delta_and_new_ones_have_none(tied, options, tmp_path):
    model = adapted(tied, **options)
    y = model(X).logits
    model.resize_token_embeddings(MORE)
    assert torch.equal(model(X).logits[..., :ROWS], y)
    assert no_drift(model)
    new = torch.full((1, 2), MORE - 1)
    with disabled(model):
        base = model.get_input_embeddings()(new)
    assert torch.equal(model.get_input_embeddings()(new), base)
    model(new).logits.sum().backward()
    assert all(p.grad.shape == p.shape for p in lora_parameters(model))
    torch.optim.Adam(lora_parameters(model), 0.1).step()
    assert not torch.equal(model.get_input_embeddings()(new), base)

    save(model, tmp_path)
    other = llama(tied)
    other.resize_token_embeddings(MORE)
    other.load_state_dict(model.state_dict(), strict=False)
    load(other, tmp_path, other_base=True)
    torch.testing.assert_close(other(X).logits, model(X).logits)
    if not tied:
        merge(model)
        unmerge(model)
    strip(model)
    assert all(p.requires_grad for p in model.parameters())
    assert "resize_token_embeddings" not in vars(model)
    assert not any("lora" in key for key in model.state_dict())


def test_fewer_rows_and_the_same_number():
    model = adapted()
    model(X).logits.sum().backward()
    y = model(X).logits
    model.resize_token_embeddings(20)
    assert torch.equal(model(X).logits, y[..., :20])
    model.resize_token_embeddings(20)
    assert no_drift(model)
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    strip(model)


def test_a_base_that_is_not_adapted_is_frozen_still_and_comes_back():
    model = adapted(targets=["q_proj"])
    model.resize_token_embeddings(MORE)
    assert no_drift(model)
    assert not model.lm_head.weight.requires_grad
    strip(model)
    assert model.lm_head.weight.requires_grad


def test_what_trains_in_place_keeps_its_rows_and_its_former_ones():
    model, base = adapted(targets=["q_proj"], train_also=["embed_tokens", "lm_head"]), llama()
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1)
    y = model(X).logits
    model.resize_token_embeddings(MORE)
    assert torch.equal(model(X).logits[..., :ROWS], y)
    assert no_drift(model)
    use(model)
    assert torch.equal(model(X).logits[..., :ROWS], base(X).logits)
    use(model, "default")
    assert torch.equal(model(X).logits[..., :ROWS], y)
    strip(model)
    assert torch.equal(model(X).logits[..., :ROWS], base(X).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_resized_on_their_own(copied):
    model = adapted()
    other = copied(model)
    other.resize_token_embeddings(MORE)
    assert other.lm_head.weight.shape[0] == MORE
    assert model.lm_head.weight.shape[0] == ROWS
    assert no_drift(model)
    assert no_drift(other)


def test_what_cannot_have_rows_added_is_refused_before_anything_changes():
    model = adapted(variant="dora")
    with pytest.raises(UnsupportedLayerError, match="cannot have rows added"):
        model.resize_token_embeddings(MORE)
    assert model.get_input_embeddings().weight.shape[0] == ROWS
