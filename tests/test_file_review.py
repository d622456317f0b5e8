"""What reviews of the adapter files found: tied places, orders, casts, names, odd values."""

import copy
import json

import pytest
import torch
import transformers as tf
from families import DECODER
from helpers import PEFT_WARNS, ids, randomize_adapters
from stored_models import Nested, Tied, bare, peft_loads, trained
from torch import nn

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectError,
    extract,
    inject,
    load,
    load_lora_state_dict,
    lora_state_dict,
    merge,
    save,
    strip,
)
from lora_inject.files.convert import convert

pytestmark = pytest.mark.usefixtures("device")


class Square(nn.Module):
    """Two fused weights of one shape, so that a swap would not be noticed."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, 4, 4)) for _ in range(2))

    def forward(self, x):
        return sum(torch.relu(x @ self.up[e].T) @ self.down[e].T for e in range(3))


@PEFT_WARNS
def test_fused_weights_are_written_in_the_order_of_the_module(tmp_path):
    base, x = Nested(Square()).eval(), torch.randn(2, 4)
    model = copy.deepcopy(base)
    inject(model, ["b.down", "b.up"], r=2, layout="out_in")
    randomize_adapters(model)
    save(model, tmp_path)
    for other in (load(copy.deepcopy(base), tmp_path), peft_loads(base, tmp_path)):
        torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(load(model, tmp_path)(x), model(x))  # filling reads the parameters too


@PEFT_WARNS
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


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("place", ["emb", "head"])
def test_tied_adapters_come_back(place, portable, tmp_path):
    base, tokens = Tied(), torch.arange(9)
    model = copy.deepcopy(base)
    inject(model, place, r=2, alpha=3)
    randomize_adapters(model)
    expected = model(tokens)
    save(model, tmp_path, portable=portable)
    torch.testing.assert_close(load(copy.deepcopy(base), tmp_path)(tokens), expected)
    torch.testing.assert_close(load(model, tmp_path)(tokens), expected)
    state = lora_state_dict(model)
    assert {key.split(".")[0] for key in state} == {"emb", "head"}
    load_lora_state_dict(model, state)
    follower = next(key for key in state if not key.startswith(place))
    with pytest.raises(FormatError, match="tied in this model"):
        load_lora_state_dict(model, {**state, follower: state[follower] + 1})


@PEFT_WARNS
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


@PEFT_WARNS
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


@PEFT_WARNS
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


def test_values_too_large_for_the_model_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", r=2)
    with torch.no_grad():
        model[0].lora_B.fill_(1e6)
    save(model, tmp_path)
    base = strip(copy.deepcopy(model))
    with pytest.raises(FormatError, match="not finite"):
        load(copy.deepcopy(base), tmp_path, dtype=torch.float16)
    small = copy.deepcopy(base)
    inject(small, "0", r=2, dtype=torch.float16)
    with pytest.raises(FormatError, match="too large"):
        load(small, tmp_path)


@pytest.mark.parametrize("alpha", [1e-7, 1e6, 7.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_portable_files_of_16_bits_lose_nothing(alpha, dtype, tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    base = copy.deepcopy(model)
    inject(model, "0", r=3, alpha=alpha, dtype=dtype)
    randomize_adapters(model)
    save(model, tmp_path, portable=True)
    loaded = load(base, tmp_path, dtype=torch.float32)
    model.float()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


@PEFT_WARNS
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


@PEFT_WARNS
def test_names_are_no_expressions(tmp_path):
    base = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("x(1)", "a+b", "x[0]", "y")})
    model = copy.deepcopy(base)
    for i, name in enumerate(base):
        inject(model, lambda path, _, name=name: path == name, r=i + 1)
    save(model, tmp_path)
    assert load(copy.deepcopy(base), tmp_path)["x[0]"].lora_A.shape[0] == 3
    peft_loads(base, tmp_path)


def test_train_also_is_read_by_the_whole_path(tmp_path):
    base = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])])
    model = copy.deepcopy(base)
    inject(model, "1.1", r=1, train_also=lambda path, _: path == "0")
    with pytest.raises(FormatError, match=r"PEFT would take 1\.0 for one"):
        save(model, tmp_path)
    head = nn.ModuleDict({"q": nn.Linear(2, 2), "h": nn.ModuleList([nn.Linear(2, 2)])})
    other = copy.deepcopy(head)
    inject(other, "q", r=1, train_also=["h", "h.0"])
    save(other, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["h"]
    assert load(head, tmp_path)["h"][0].weight.requires_grad


def test_router_weights_and_shared_layers(tmp_path):
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x @ self.weight.T

    base, x = Nested(Router()), torch.randn(2, 4)
    model = copy.deepcopy(base)
    inject(model, "a.b.weight", r=2)
    randomize_adapters(model)
    save(model, tmp_path)
    torch.testing.assert_close(load(base, tmp_path)(x), model(x))
    shared = nn.ModuleDict({"one": nn.Linear(2, 2)})
    shared["two"] = shared["one"]
    inject(shared, "one", r=1)
    with pytest.raises(FormatError, match="one stands at several paths"):
        save(shared, tmp_path)
    root = nn.Linear(2, 2)
    inject(root, nn.Linear, r=1)
    with pytest.raises(FormatError, match="the model itself is nothing that PEFT can adapt"):
        save(root, tmp_path)


def test_bases_that_are_the_same_and_that_are_not(tmp_path):
    whole = bare()
    for saved, loaded in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        model = copy.deepcopy(whole).to(saved)
        inject(model, "q_proj", r=2)
        save(model, tmp_path)
        load(copy.deepcopy(whole).to(loaded), tmp_path)
    for value in (float("nan"), 1.0):
        model = copy.deepcopy(whole)
        with torch.no_grad():
            model.layers[0].q_proj.weight[0, 0] = value
        inject(model, "q_proj", r=2)
        save(model, tmp_path)
        load(strip(copy.deepcopy(model)), tmp_path)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    other = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    normed, other = nn.ModuleList([normed]), nn.ModuleList([other])
    inject(normed, "0", r=1)
    save(normed, tmp_path)
    with pytest.raises(FormatError, match="not those that the adapter was made for"):
        load(other, tmp_path)
    merge(model)
    with pytest.raises(LoRAInjectError, match="merged now"):
        load(model, tmp_path)


def test_quantized_bases(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")

    model = nn.Sequential(nn.Linear(64, 64))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    inject(model, "0", r=2)
    randomize_adapters(model)
    save(model, tmp_path)
    x = torch.randn(2, 64)
    expected = model(x)
    assert torch.equal(load(strip(model), tmp_path)(x), expected)


def test_extract_sees_adapters_and_ties():
    base, tuned = (nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(2))
    for model in (base, tuned):
        inject(model, "0", r=2)
        with pytest.raises(ArgumentError, match="adapters in use"):
            extract(base, tuned, "0", r=2)
        strip(model)
    tied, untied = Tied(), Tied()
    untied.head.weight = nn.Parameter(torch.randn(9, 4))
    assert extract(tied, untied, "emb", r=4).others == ("head.weight",)
    assert extract(Tied(), Tied(), "emb", r=4).others == ()
    with torch.no_grad():
        tuned[0].weight.fill_(float("inf"))
    with pytest.raises(ArgumentError, match="not finite"):
        extract(base, tuned, "0", r=2)
    with torch.no_grad():
        tuned[0].weight.copy_(torch.randn(4, 4) * 1e38)
    with pytest.raises(ArgumentError, match="too large"):
        extract(base, tuned, "0", r=2)
    half, other = (nn.Sequential(nn.Linear(32, 32)).bfloat16() for _ in range(2))
    assert extract(half, other, "0", r=32, dtype="base").worst > 1e-4  # bfloat16 loses as much


@pytest.mark.parametrize("alpha", [0, -3, True, "3", float("nan")])
def test_alpha_is_checked(alpha, tmp_path):
    model = trained()
    save(model, tmp_path / "a.pt", format="loralib")
    with pytest.raises(ArgumentError, match="alpha"):
        load(model, tmp_path / "a.pt", alpha=alpha)
    with pytest.raises(ArgumentError, match="alpha"):
        convert(tmp_path / "a.pt", tmp_path / "b", "peft", alpha=alpha)


@pytest.mark.parametrize(
    "value",
    [None, 3, [1.0], torch.ones(2, 8).to_sparse(), torch.ones(2, 8, device="meta"),
     torch.ones(2, 8, dtype=torch.complex64), torch.ones(2, 8).to(torch.float8_e4m3fn),
     torch.ones(2, 8, dtype=torch.int64)],
    ids=lambda value: str(getattr(value, "dtype", value)),
)  # fmt: skip
def test_odd_values_in_a_state_dict(value):
    model = trained()
    state = {**lora_state_dict(model), "layers.0.q_proj.lora_A": value}
    with pytest.raises(FormatError, match=r"layers\.0\.q_proj\.lora_A"):
        load_lora_state_dict(model, state)
    for odd in (5, [("a", 1)], {1: torch.ones(1)}):
        with pytest.raises(ArgumentError, match="state must be a mapping"):
            load_lora_state_dict(model, odd)


def test_two_keys_that_mean_one_and_names_of_real_modules():
    model = trained()
    state = lora_state_dict(model)
    key = next(iter(state))
    with pytest.raises(FormatError, match="two of the keys mean"):
        load_lora_state_dict(model, {**state, f"module.{key}": state[key]})
    real = nn.ModuleDict({"q": nn.Linear(2, 2), "module": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    inject(real, lambda path, _: path == "q", r=1)
    own = {f"module.{key}": value for key, value in lora_state_dict(real).items()}
    with pytest.raises(FormatError, match="2 missing"):
        load_lora_state_dict(real, own)


@pytest.mark.parametrize("path", [3, None, 1.5])
def test_paths_that_are_none(path, tmp_path):
    model = trained()
    for call in (save, load):
        with pytest.raises(ArgumentError, match="path must be a path"):
            call(model, path)
    with pytest.raises(FormatError, match="no file or directory"):
        load(model, tmp_path / ("x" * 300))
    with pytest.raises(LoRAInjectError):
        save(model, "a\0b")
    with pytest.raises(ArgumentError, match="format must be one of"):
        save(model, tmp_path, format=["peft"])


def test_wrapped_models_read_every_format(tmp_path):
    model, x = trained(), ids()
    save(model, tmp_path / "k.safetensors", format="kohya")
    wrapped = torch.compile(bare(), backend="eager")
    torch.testing.assert_close(load(wrapped, tmp_path / "k.safetensors")(x), model(x))
