"""Checkpoints of whole models with A and B in them: their adapter is loaded, and it is said."""

import copy

import pytest
import torch
import transformers as tf
from helpers import ids, randomize_adapters
from safetensors.torch import save_file
from stored_models import bare, trained

from lora_inject import FormatError, LoRAInjectWarning, inject, load, lora_state_dict, use
from lora_inject.files.convert import inspect

pytestmark = pytest.mark.cpu("files are read on it")

SAID = "is a checkpoint of a whole model, of which from_pretrained leaves the adapter out.*{}"
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 30,
}  # fmt: skip
MODELS = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**SMALL, num_key_value_heads=1), "q_proj"),
    "tied llama": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True),
        "q_proj",
    ),
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**SMALL), "query"),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_of_an_adapted_model_is_loaded(name, sharded, tmp_path):
    cls, config, target = MODELS[name]
    also = {"train_also": "classifier"} if name == "bert" else {}
    model = cls(config).eval()
    base = copy.deepcopy(model)
    inject(model, target, r=2, alpha=6, **also)
    randomize_adapters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5) if p.requires_grad and also else None
    model.save_pretrained(tmp_path, max_shard_size="4KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors").exists() is not sharded
    x = torch.arange(6).view(1, 6)
    with pytest.warns(LoRAInjectWarning, match=SAID.format("on 2 layers")):
        load(base, tmp_path, alpha=6)
    assert torch.equal(base(x)[0], model(x)[0])
    own, other = lora_state_dict(model), lora_state_dict(base)
    assert own.keys() == other.keys()
    assert "checkpoint of a whole model" in str(inspect(tmp_path))


def test_without_alpha_it_says_what_it_is_and_asks(tmp_path):
    save_file(trained().state_dict(), tmp_path / "model.safetensors")
    said = pytest.warns(LoRAInjectWarning, match=SAID.format("on 4 layers"))
    with said, pytest.raises(FormatError, match=r"does not say alpha.*Say it: alpha=16"):
        load(bare(), tmp_path)
    model, x = trained(), ids()
    with pytest.warns(LoRAInjectWarning, match=SAID.format("")):
        load(model, tmp_path)  # which knows it
    assert torch.equal(model(x), trained()(x))


def test_another_base_is_refused(tmp_path):
    save_file(trained().state_dict(), tmp_path / "model.safetensors")
    other = bare()
    with torch.no_grad():
        other.layers[0].q_proj.weight.mul_(2)
    with (
        pytest.warns(LoRAInjectWarning, match="whole model"),
        pytest.raises(FormatError, match=r"the weight of the adapted layer layers\.0\.q_proj"),
    ):
        load(other, tmp_path, alpha=3)


def test_a_single_adapter_with_a_name_is_it(tmp_path):
    model, x = bare(), ids()
    inject(model, "q_proj", r=2, adapter="fr")
    randomize_adapters(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(LoRAInjectWarning, match="whole model"):
        assert torch.equal(load(bare(), tmp_path, alpha=2)(x), model(x))


def several():
    model = trained()
    inject(model, "q_proj", r=2, adapter="fr")
    use(model, "default", "fr")
    return model


def dora():
    model = bare()
    inject(model, "q_proj", r=2, variant="dora")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bare, "no A and B in it"),
        (several, r"several adapters, \['default', 'fr'\].*load_state_dict"),
        (dora, "lora_magnitude is of no plain LoRA.*load_state_dict"),
    ],
    ids=["base", "several", "dora"],
)
def test_what_cannot_be_read_says_what_it_is(make, message, tmp_path):
    save_file(make().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=f"is a checkpoint of a whole model.*{message}"):
        load(bare(), tmp_path, alpha=2)


def test_loralibs_keys_in_a_safetensors_file_are_read(tmp_path):
    model, x = trained(), ids()
    save_file(lora_state_dict(model), tmp_path / "a.safetensors")
    with pytest.warns(LoRAInjectWarning):
        assert torch.equal(load(bare(), tmp_path / "a.safetensors", alpha=3)(x), model(x))
