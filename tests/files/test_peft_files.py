"""PEFT directories both ways: what we save PEFT loads, and what it saves we load."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import DECODER, FAMILIES, mixtral, unet
from helpers import PEFT_WARNS, changed_parts, randomize_adapters, snapshot
from stored_models import Experts, Nested, Tied, peft_loads
from torch import nn

from lora_inject import (
    FormatError,
    inject,
    load,
    lora_state_dict,
    report,
    save,
    strip,
)
from lora_inject.files.formats import peft as peft_format
from lora_inject.files.formats.peft_config import check_config

pytestmark = [PEFT_WARNS, pytest.mark.usefixtures("device")]


def conv1d():
    return tf.pytorch_utils.Conv1D(6, 4)


x4 = (torch.randn(3, 4),)
KINDS = {
    "linear": (lambda: nn.Linear(4, 6), x4, {}),
    "conv1d_hf": (conv1d, x4, {}),
    "embedding": (lambda: nn.Embedding(9, 4), (torch.arange(9),), {}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (torch.randn(2, 4, 7),), {}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (torch.randn(2, 4, 7, 7),), {}),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (torch.randn(2, 4, 7, 7),), {}),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (torch.randn(2, 4, 5, 5, 5),), {}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (torch.randn(3, 2, 4),) * 3, {}),
    "experts": (Experts, x4, {"layout": "out_in"}),
    "experts_transposed": (lambda: Experts(True), x4, {}),
    "parts": (lambda: nn.Linear(4, 6), x4, {"parts": {"a.b": ("q", None, "v")}}),
}


def case(kind):
    """How to build a layer, its inputs on the default device, and options of inject."""
    build, inputs, options = KINDS[kind]
    return build, [x.to(torch.get_default_device()) for x in inputs], options


def targets_of(kind):
    if kind.startswith("experts"):
        return ["b.up", "b.down"]
    return ["a.b", "a.b.out_proj"] if kind == "attention" else "a.b"


def same_in_double(one, other, inputs):
    """Whether two models have the same values: in float64 nothing hides behind rounding."""
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    outputs = [copy.deepcopy(model).double()(**inputs)[0] for model in (one, other)]
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_peft_and_back(kind, tmp_path):
    torch.manual_seed(0)
    build, inputs, options = case(kind)
    base = Nested(build()).eval()
    model = copy.deepcopy(base)
    inject(model, targets_of(kind), r=2, alpha=3, **options)
    randomize_adapters(model)
    expected = model(*inputs)
    assert not torch.allclose(expected, base(*inputs))
    save(model, tmp_path)
    theirs = peft_loads(base, tmp_path)
    torch.testing.assert_close(theirs(*inputs), expected, atol=1e-6, rtol=1e-5)
    if "parts" in options:
        options = {}
    ours = copy.deepcopy(base)
    assert load(ours, tmp_path) is ours
    assert torch.equal(ours(*inputs), expected)
    for key, value in lora_state_dict(model).items():
        assert torch.equal(lora_state_dict(ours)[key], value), key
    assert report(ours).trainable == report(model).trainable
    before = snapshot(base)
    load(base, tmp_path)
    strip(base)
    assert changed_parts(before, snapshot(base)) == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("parts", "conv2d_grouped")])
def test_peft_to_ours(kind, tmp_path):
    import peft

    torch.manual_seed(0)
    build, inputs, _ = case(kind)
    base = Nested(build()).eval()
    where = (
        {"target_modules": [], "target_parameters": ["b.up", "b.down"]}
        if kind.startswith("experts")
        else {"target_modules": ["b"]}
    )
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **where)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    expected = theirs(*inputs)
    theirs.save_pretrained(tmp_path)
    ours = load(base, tmp_path).eval()
    torch.testing.assert_close(ours(*inputs), expected, atol=1e-6, rtol=1e-5)


def test_an_adapter_across_groups_is_refused(tmp_path):
    """PEFT's A reads all channels of a grouped convolution; no grouped weight does."""
    import peft

    base = Nested(nn.Conv2d(4, 6, 3, groups=2))
    config = peft.LoraConfig(r=2, target_modules=["b"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"a\.b: .*several groups"):
        load(base, tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_families_both_ways(name, bias, tmp_path):
    import peft

    torch.manual_seed(0)
    family = FAMILIES[name]
    base, inputs = family.build().eval(), family.inputs()
    model = copy.deepcopy(base)
    inject(model, list(family.targets), r=3, alpha=5, bias=bias)
    randomize_adapters(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "lora" not in n:
                p.add_(0.1)
    expected = model(**inputs)[0]
    save(model, tmp_path / "ours")
    theirs = peft_loads(base, tmp_path / "ours")
    same_in_double(theirs, model, inputs)
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "ours")(**inputs)[0], expected)

    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=list(family.targets), bias=bias, init_lora_weights=False,
        rank_pattern={family.targets[0]: 4}, use_rslora=True,
    )  # fmt: skip
    other = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for n, p in other.named_parameters():
            if p.requires_grad and "lora" not in n:
                p.add_(0.1)
    other.save_pretrained(tmp_path / "theirs")
    ours = load(copy.deepcopy(base), tmp_path / "theirs").eval()
    same_in_double(ours, other, inputs)
    assert report(ours).bias == bias


def test_fused_experts_of_mixtral(tmp_path):
    import peft

    torch.manual_seed(0)
    base, inputs = mixtral().eval(), FAMILIES["mixtral"].inputs()
    model = copy.deepcopy(base)
    inject(model, ["q_proj", "experts.gate_up_proj", "experts.down_proj"], r=2, alpha=6)
    randomize_adapters(model)
    expected = model(**inputs)[0]
    save(model, tmp_path / "ours")
    theirs = peft_loads(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(**inputs)[0], expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(**inputs)[0], expected, atol=1e-5, rtol=1e-5)
    assert peft.__version__


def test_a_unet_both_ways(tmp_path):
    import peft

    torch.manual_seed(0)
    base = unet()
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 8))
    model = copy.deepcopy(base)
    targets = {"to_q": {"r": 2}, "to_v": {"r": 4, "alpha": 2}, "conv1": {"r": 3}, "proj_in": {}}
    inject(model, targets, r=2, alpha=4)
    randomize_adapters(model)
    expected = model(*inputs)[0]
    save(model, tmp_path / "ours")
    theirs = peft_loads(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(*inputs)[0], expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(*inputs)[0], expected, atol=1e-5, rtol=1e-5)
    assert peft.__version__


def test_a_trained_head_is_saved_and_read(tmp_path):
    import peft

    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_labels=3,
                           num_attention_heads=4, intermediate_size=24)  # fmt: skip
    base = tf.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 7))}
    model = copy.deepcopy(base)
    inject(model, ["query", "value"], r=2, train_also="classifier")
    randomize_adapters(model)
    nn.init.normal_(model.classifier.weight)
    expected = model(**inputs)[0]
    save(model, tmp_path / "ours")
    theirs = peft_loads(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(**inputs)[0], expected, atol=1e-6, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert peft.__version__
    for folder in ("ours", "theirs"):
        ours = load(copy.deepcopy(base), tmp_path / folder).eval()
        torch.testing.assert_close(ours(**inputs)[0], expected, atol=1e-6, rtol=1e-5)
        assert ours.classifier.weight.requires_grad
        strip(ours)
        assert torch.equal(ours(**inputs)[0], base(**inputs)[0])


def test_patterns_name_exactly_the_adapted_layers(tmp_path):
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)).eval()
    inputs = FAMILIES["llama"].inputs()
    model = copy.deepcopy(base)
    inject(model, {"layers.0.self_attn.q_proj": {"r": 4, "alpha": 1}, "v_proj": {"r": 2}}, alpha=8)
    randomize_adapters(model)
    save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    assert config["rank_pattern"] == {"q_proj": 4}
    assert config["alpha_pattern"] == {"q_proj": 1}
    assert config["task_type"] == "CAUSAL_LM"
    theirs = peft_loads(base, tmp_path)
    torch.testing.assert_close(theirs(**inputs)[0], model(**inputs)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_portable_has_one_rank_and_the_same_outputs(kind, tmp_path):
    torch.manual_seed(0)
    build, inputs, options = case(kind)
    base = Nested(build()).eval()
    base.c = nn.Linear(4, 4) if kind != "conv1d_hf" else conv1d()
    model = copy.deepcopy(base)
    targets = targets_of(kind)
    targets = targets if isinstance(targets, list) else [targets]
    inject(model, {t: {"r": i + 2, "alpha": i + 3} for i, t in enumerate([*targets, "c"])},
           **options)  # fmt: skip
    randomize_adapters(model)
    save(model, tmp_path, portable=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["lora_alpha"] == config["r"]
    torch.testing.assert_close(
        peft_loads(base, tmp_path)(*inputs), model(*inputs), atol=1e-6, rtol=1e-5
    )
    ours = load(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(ours(*inputs), model(*inputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(4, 6),
        lambda: nn.ConvTranspose1d(4, 6, 3),
        lambda: nn.Conv1d(4, 6, 3, dilation=2),
        lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    ],
)
def test_what_peft_cannot_read_is_refused(build, tmp_path):
    model = Nested(build())
    inject(model, "a.b")
    with pytest.raises(FormatError, match=r"a\.b.*lora_state_dict"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tied_weights_are_written_for_both_places(tmp_path):
    torch.manual_seed(0)
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)).eval()
    inputs = FAMILIES["llama"].inputs()
    model = copy.deepcopy(base)
    inject(model, ["embed_tokens", "q_proj"], r=2)
    randomize_adapters(model)
    save(model, tmp_path)
    import peft

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(**inputs)[0], model(**inputs)[0], atol=1e-6, rtol=1e-5)
    ours = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(ours(**inputs)[0], model(**inputs)[0])
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    tensors, metadata = peft_format.read_tensors(tmp_path / peft_format.TENSORS)
    key = "base_model.model.lm_head.lora_A.weight"
    tensors[key] += 1
    peft_format.write_tensors(tensors, tmp_path / peft_format.TENSORS, metadata)
    with pytest.raises(FormatError, match="tied in this model and have different adapters"):
        load(base, tmp_path)


class Square(nn.Module):
    """Two fused weights of one shape, so that a swap would not be noticed."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 4, 4)) for _ in range(2))

    def forward(self, x):
        return sum(torch.relu(x @ self.up[e].T) @ self.down[e].T for e in range(3))


def test_fused_weights_are_written_in_the_order_of_the_module(tmp_path):
    base, x = Nested(Square()).eval(), torch.randn(2, 4)
    model = copy.deepcopy(base)
    inject(model, ["b.down", "b.up"], r=2, layout="out_in")
    randomize_adapters(model)
    save(model, tmp_path)
    for other in (load(copy.deepcopy(base), tmp_path), peft_loads(base, tmp_path)):
        torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(load(model, tmp_path)(x), model(x))  # filling reads the parameters too


@pytest.mark.parametrize("place", ["emb", "head"])
def test_one_place_of_a_tied_weight_stays_one(place, tmp_path):
    import peft

    base, tokens = Tied().eval(), torch.arange(9)
    model = copy.deepcopy(base)
    inject(model, place, exclude={"emb": "head", "head": "emb"}[place], r=2)
    randomize_adapters(model)
    save(model, tmp_path / "ours")
    torch.testing.assert_close(load(copy.deepcopy(base), tmp_path / "ours")(tokens), model(tokens))
    config = peft.LoraConfig(target_modules=[place], init_lora_weights=False, r=2)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-6, rtol=1e-5)


def test_a_tied_module_that_trains_in_full_is_not_untied(tmp_path):
    import peft

    base = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True))
    model = copy.deepcopy(base)
    inject(model, "q_proj", r=2, train_also="lm_head")
    with pytest.raises(FormatError, match="untied"):
        save(model, tmp_path / "ours")
    save(model, tmp_path / "ours.pt", format="loralib")
    load(copy.deepcopy(base), tmp_path / "ours.pt", alpha=2)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(FormatError, match="is tied in this model"):
        load(base, tmp_path / "theirs")


def test_what_peft_repeats_of_the_base_does_not_train(tmp_path):
    import peft

    base = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)).eval()
    config = peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(copy.deepcopy(base), tmp_path)
    tokens = {"input_ids": torch.randint(3, 60, (2, 5))}
    torch.testing.assert_close(ours(**tokens)[0], theirs(**tokens)[0], atol=1e-5, rtol=1e-5)
    assert all("lora" in name for name, p in ours.named_parameters() if p.requires_grad)
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1)
    with pytest.raises(FormatError, match=r"weight of the adapted layer model\.embed_tokens"):
        load(base, tmp_path)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_classifiers_of_peft(bias, tmp_path):
    import peft

    config = tf.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_labels=3,
                           num_attention_heads=4, intermediate_size=24)  # fmt: skip
    base = tf.BertForSequenceClassification(config).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias=bias,
                        init_lora_weights=False),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad and "lora" not in name:
                p.add_(0.1)
    theirs.save_pretrained(tmp_path)
    ours, tokens = load(base, tmp_path).eval(), {"input_ids": torch.randint(3, 60, (2, 5))}
    torch.testing.assert_close(ours(**tokens)[0], theirs(**tokens)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("half", ["a.b", "a.b.out_proj"])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("portable", [False, True])
def test_one_half_of_an_attention(half, bias, portable, tmp_path):
    base, x = Nested(nn.MultiheadAttention(4, 2)).eval(), (torch.randn(3, 2, 4),) * 3
    model = copy.deepcopy(base)
    inject(model, half, r=2, alpha=3, bias=bias)
    randomize_adapters(model)
    expected = model(*x)
    save(model, tmp_path, portable=portable)
    torch.testing.assert_close(peft_loads(base, tmp_path)(*x), expected, atol=1e-6, rtol=1e-5)
    for other in (copy.deepcopy(base), model):
        torch.testing.assert_close(load(other, tmp_path)(*x), expected)


def test_names_are_no_expressions(tmp_path):
    base = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("x(1)", "a+b", "x[0]", "y")})
    model = copy.deepcopy(base)
    for i, name in enumerate(base):
        inject(model, lambda path, _, name=name: path == name, r=i + 1)
    save(model, tmp_path)
    assert load(copy.deepcopy(base), tmp_path)["x[0]"].lora_A.shape[0] == 3
    peft_loads(base, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "lora", "num_layers": 4}, "mlx-lm"),
        ({"config": {"reduction_factor": 16}, "version": "adapters.1.0.1"}, "AdapterHub"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING of PEFT, and no LoRA.*Use it with PEFT"),
        ({"r": 2}, 'add "peft_type": "LORA"'),
        ({"peft_type": "LORA", "use_qalora": True}, "merge_and_unload"),
        ({"peft_type": "LORA", "trained_with": "a tool"}, "remove trained_with"),
    ],
)
def test_configs_of_others_say_what_they_are_and_what_to_do(config, message):
    with pytest.raises(FormatError, match=message):
        check_config(config, Path("adapter_config.json"))


@pytest.mark.parametrize("key", ["loftq_config", "corda_config", "lora_ga_config", "merge_weights"])
def test_what_is_left_over_of_a_start_that_was_converted_does_not_matter(key):
    check_config({"peft_type": "LORA", key: {"bits": 4}}, Path("adapter_config.json"))
    moved = {"peft_type": "LORA", "init_lora_weights": "corda", key: {"bits": 4}}
    with pytest.raises(FormatError, match="moves the weights"):
        check_config(moved, Path("adapter_config.json"))
