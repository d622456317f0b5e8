"""rsLoRA: ``alpha / sqrt(r)``, whatever it is asked of, beside PEFT's and in files."""

import json
import math
import pickle

import pytest
import torch
from families import llama as random_llama
from helpers import PEFT_WARNS, Net, changed_parts, ids, randomize_adapters, snapshot
from torch import nn

from lora_inject import ArgumentError, inject, load, merge, plan, save, strip, unmerge
from lora_inject.core.state import adapters_of
from lora_inject.files.convert import convert


def llama():
    torch.manual_seed(0)
    return random_llama()


def scaled(model, *names):
    return [adapters_of(model.get_submodule(name))[0].settings.scaling for name in names]


def test_the_factor_of_every_layer_follows_from_its_own_rank_and_alpha():
    model = Net()
    targets = {"q_proj": {"r": 4, "alpha": 8}, "v_proj": {"r": 9}, "embed": {"scaling": "lora"}}
    inject(model, targets, r=2, alpha=6, scaling="rslora")
    assert scaled(model, "layers.0.q_proj", "layers.1.v_proj", "embed") == [4.0, 2.0, 3.0]
    assert "rslora" in repr(model.layers[0].q_proj)
    assert "rslora" not in repr(model.embed)
    assert "rslora" in str(plan(Net(), "q_proj", scaling="rslora"))


def test_values_merge_and_strip():
    model = Net().double()
    before = snapshot(model)
    inject(model, "q_proj", r=4, alpha=6, scaling="rslora")
    randomize_adapters(model)
    layer = model.layers[0].q_proj
    x = torch.randn(3, 8, dtype=torch.float64)
    update = 6 / math.sqrt(4) * layer.lora_B @ layer.lora_A
    expected = x @ (layer.weight + update).T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    merge(model)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    unmerge(model)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied.layers[0].q_proj(x), layer(x))
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@PEFT_WARNS
def test_it_is_what_peft_computes_and_files_keep_it(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = llama()
    inject(model, ["q_proj", "down_proj"], r=4, alpha=6, scaling="rslora")
    randomize_adapters(model)
    save(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 4, 6)

    x = ids(vocabulary=20)
    peft = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(peft(x).logits, model(x).logits)
    again = llama()
    load(again, tmp_path / "ours")
    assert torch.equal(again(x).logits, model(x).logits)
    name = "model.layers.0.self_attn.q_proj"
    assert adapters_of(again.get_submodule(name))[0].settings == (
        adapters_of(model.get_submodule(name))[0].settings
    )

    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"]}
    theirs = get_peft_model(llama(), LoraConfig(**options, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x).logits, theirs(x).logits)
    assert scaled(ours, name) == [3.0]


def test_layers_of_several_rules_are_written_with_alphas_that_say_the_same(tmp_path):
    model = Net()
    inject(model, {"q_proj": {"scaling": "rslora"}, "v_proj": {}}, r=4, alpha=6)
    randomize_adapters(model)
    x = ids()
    save(model, tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    again = Net()
    again.load_state_dict(model.state_dict(), strict=False)
    load(again, tmp_path / "mixed")
    assert torch.equal(again(x), model(x))


def test_other_formats_and_portable_files_have_the_same_factor(tmp_path):
    model = Net()
    inject(model, "q_proj", r=4, alpha=6, scaling="rslora")
    randomize_adapters(model)
    x = ids()
    save(model, tmp_path / "portable", portable=True)
    save(model, tmp_path / "a.safetensors", format="kohya")
    save(model, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "b.safetensors", to="kohya")
    for file in ("portable", "a.safetensors", "b.safetensors"):
        again = Net()
        again.load_state_dict(model.state_dict(), strict=False)
        load(again, tmp_path / file)
        torch.testing.assert_close(again(x), model(x))


def test_grouped_convolutions_count_the_rank_of_one_group(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    inject(model, "0", r=4, alpha=6, scaling="rslora")
    randomize_adapters(model)
    save(model, tmp_path / "a")
    again = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    again.load_state_dict(model.state_dict(), strict=False)
    load(again, tmp_path / "a")
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize("wrong", ["rs", None, 1])
def test_a_wrong_word_is_refused(wrong):
    with pytest.raises(ArgumentError, match=r"scaling must be one of \['lora', 'rslora'\]"):
        inject(Net(), "q_proj", scaling=wrong)
