"""What somebody who saves or loads will hardly have meant is said, with what to do."""

import json
import warnings

import pytest
import torch
import transformers as tf
from families import DECODER, FAMILIES
from helpers import Net, ids, randomize_adapters, train_steps
from stored_models import trained
from torch import nn

from lora_inject import (
    LoRAInjectWarning,
    inject,
    load,
    lora_parameters,
    report,
    save,
    use,
)

pytestmark = pytest.mark.cpu("it is about files")


def step(model, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        model(ids()).square().mean().backward()
        optimizer.step()


def quietly(action, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action(*args, **options)


# By name: what is injected besides the targets of an adapter that never trains.
UNTRAINED = {
    "lora": {},
    "head": {"train_also": "head"},
    "pissa": {"init": "pissa"},
    "dora": {"variant": "dora"},
    "loha": {"variant": "loha"},
    "lokr": {"variant": "lokr"},
    "fixed": {"fixed": "A"},
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_optimizer_from_before_inject_trains_no_adapter_and_saving_says_so(name, tmp_path):
    model = Net()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    inject(model, ["q_proj", "v_proj"], r=2, **UNTRAINED[name])
    step(model, before)
    said = r"'default' was never trained: .* build the optimizer after inject, with lora_parameters"
    with pytest.warns(LoRAInjectWarning, match=said):
        save(model, tmp_path / "a")
    step(model, torch.optim.SGD(lora_parameters(model), lr=0.1))
    quietly(save, model, tmp_path / "a")


def test_an_embedding_that_never_trained_is_said_too(tmp_path):
    model = Net()
    inject(model, "embed", r=2)  # whose A begins at zero
    with pytest.warns(LoRAInjectWarning, match="never trained"):
        save(model, tmp_path / "a")
    train_steps(model, ids())
    quietly(save, model, tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "format", "instead"),
    [
        ("x.safetensors", "peft", "kohya"),
        ("x.safetensors", "diffusers", "kohya"),
        ("x.pt", "peft", "loralib"),
    ],
)
def test_a_directory_under_the_name_of_a_file_is_said(name, format, instead, tmp_path):
    model = trained()
    with pytest.warns(LoRAInjectWarning, match=f"becomes a directory.*format='{instead}'"):
        save(model, tmp_path / name, format=format)
    quietly(save, model, tmp_path / name, format=format)  # it is one already
    load(Net(), tmp_path / name, other_base=True)
    for usual in ("adapter", "v1.5"):
        quietly(save, model, tmp_path / usual)


def test_an_adapter_that_is_loaded_beside_one_in_use_is_said(tmp_path):
    model = trained()
    save(model, tmp_path / "a")
    model = Net()
    quietly(load, model, tmp_path / "a", other_base=True)
    x = ids()
    y = model(x)
    remedies = r"use\(model, 'fr'\) switches to it, use\(model, 'default', 'fr'\) adds it"
    with pytest.warns(LoRAInjectWarning, match=f"'fr' is loaded and not in use.*{remedies}"):
        load(model, tmp_path / "a", adapter="fr", other_base=True)
    assert torch.equal(model(x), y)
    assert [row.use_text for row in report(model).patterns] == ["yes", "no"]
    quietly(load, model, tmp_path / "a", adapter="fr", other_base=True)  # fills it
    use(model)
    quietly(load, model, tmp_path / "a", adapter="de", other_base=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("inference", [False, True])
def test_adapters_of_peft_that_inject_freezes_are_said(inference):
    import peft

    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=9,
    )  # fmt: skip
    settings = peft.LoraConfig(target_modules=["v_proj"], inference_mode=inference)
    model = peft.get_peft_model(tf.LlamaForCausalLM(config), settings)
    if inference:
        quietly(inject, model, "q_proj", r=2)
    else:
        with pytest.warns(LoRAInjectWarning, match=r"2 layers carry adapters of PEFT.*unload\(\)"):
            inject(model, "q_proj", r=2)
    theirs = [p for n, p in model.named_parameters() if "v_proj.lora" in n]
    assert len(theirs) == 4
    assert not any(p.requires_grad for p in theirs)


def test_what_is_in_order_is_saved_and_loaded_without_a_word(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(model, "0", r=2)
    randomize_adapters(model)
    for format, path in {"peft": "p", "diffusers": "d", "loralib": "a.pt",
                         "kohya": "a.safetensors"}.items():  # fmt: skip
        quietly(save, model, tmp_path / path, format=format)


# By name: a family, what is injected, and what is said of it.
MISREAD = {
    "ranks": ("llama", {"q_proj": {"r": 4}, "v_proj": {"r": 2}}, "SGLang and llama.cpp"),
    "alphas": ("llama", {"q_proj": {"alpha": 4}, "v_proj": {"alpha": 2}}, "SGLang and llama.cpp"),
    "rslora": ("llama", {"q_proj": {"scaling": "rslora"}, "v_proj": {"scaling": "rslora"}},
               "SGLang and llama.cpp.*alpha / r"),
    "k alone": ("llama", {"k_proj": {}}, r"SGLang.*\.k_proj without q_proj and v_proj"),
    "q alone": ("llama", {"q_proj": {}}, r"SGLang.*\.q_proj without q_proj and v_proj"),
    "up alone": ("llama", {"up_proj": {}}, r"SGLang.*mlp\.up_proj without gate_proj"),
    "experts": ("qwen3_moe", {"mlp.experts.down_proj": {}}, r"vLLM.*experts\.0\.down_proj"),
    "router": ("mixtral", {r"re:.*mlp\.gate\.weight": {}}, r"vLLM.*block_sparse_moe\.gate"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISREAD)
def test_engines_that_would_misread_a_file_are_named(name, tmp_path):
    family, targets, said = MISREAD[name]
    model = FAMILIES[family].build()
    inject(model, targets, r=2)
    randomize_adapters(model)
    with pytest.warns(LoRAInjectWarning, match=f"misread by.*{said}.*portable=True"):
        save(model, tmp_path / "a")
    quietly(save, model, tmp_path / "b", portable=True)
    for format, path in {"loralib": "a.pt", "diffusers": "c"}.items():
        quietly(save, model, tmp_path / path, format=format)


def test_half_of_fused_experts_is_said_where_checkpoints_have_them_fused(tmp_path):
    config = tf.GptOssConfig(**DECODER, head_dim=4, num_local_experts=2, num_experts_per_tok=1)
    model = tf.GptOssForCausalLM(config)
    inject(model, "experts.down_proj", r=2)
    randomize_adapters(model)
    with pytest.warns(LoRAInjectWarning, match=r"vLLM, which fails.*without gate_up_proj"):
        save(model, tmp_path / "a")
    quietly(save, model, tmp_path / "b", portable=True)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "v_proj"], ["gate_proj", "o_proj"], ["q_proj", "v_proj", "k_proj"]],
)
def test_engines_that_read_a_file_as_it_is_meant_are_not_named(targets, tmp_path):
    model = FAMILIES["llama"].build()
    inject(model, targets, r=2, alpha=4)
    randomize_adapters(model)
    quietly(save, model, tmp_path / "a")


@pytest.mark.parametrize("family", ["vit", "bert", "t5"])
def test_engines_are_not_named_where_they_serve_no_such_model(family, tmp_path):
    model = FAMILIES[family].build()
    first, *others = FAMILIES[family].targets
    inject(model, {first: {"r": 4}, **{name: {"r": 2} for name in others}})
    randomize_adapters(model)
    quietly(save, model, tmp_path / "a")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_mode_of_biases_without_a_bias_is_none_for_others_and_comes_back(bias, tmp_path):
    def net(own):
        return nn.Sequential(nn.Linear(4, 4, bias=own))

    for own, word in ((False, "none"), (True, bias)):
        model = net(own)
        inject(model, "0", r=2, bias=bias)
        randomize_adapters(model)
        save(model, tmp_path / word)
        config = json.loads((tmp_path / word / "adapter_config.json").read_text())
        assert config["bias"] == word  # vLLM refuses the others
        load(model, tmp_path / word)  # into the adapter of that mode
        again = load(net(own), tmp_path / word, other_base=True)
        assert report(again).to_dict()["bias"] == report(model).to_dict()["bias"]
