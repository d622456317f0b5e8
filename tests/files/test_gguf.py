"""GGUF files for llama.cpp: its names, its order of rows, one alpha; read back by others' readers.

transformers reads GGUF files of whole models. A file of the changes that an adapter makes, in
llama.cpp's layout, must come out as these changes by the names of transformers.
"""

import copy
import sys

import pytest
import torch
import transformers as tf
from engines import changes_of, tensors_of
from families import DECODER, bert, llama, mixtral, qwen3_moe
from helpers import PEFT_WARNS, randomize_adapters
from test_checkpoint_names import DOWN, GATE_UP, ROUTER, built, old_experts, write_old

from lora_inject import FormatError, convert, inject, load, save, strip
from lora_inject.cli.main import main

gguf = pytest.importorskip("gguf")
pytestmark = [pytest.mark.cpu("it is about files"), PEFT_WARNS]

SIZES = {"head_dim": 4}
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": (llama, "llama"),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER)), "qwen2"),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, **SIZES)), "qwen3"),
    "gemma2": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, **SIZES, pad_token_id=0)),
        "gemma2",
    ),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**DECODER, pad_token_id=0)), "phi3"),
    "qwen2_moe": (
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(**DECODER, **EXPERTS, shared_expert_intermediate_size=8)
        ),
        "qwen2moe",
    ),
    "qwen3_moe": (qwen3_moe, "qwen3moe"),
}


def by_transformers(path, model, folder):
    """The same changes by the names of transformers, read by it as weights of a model."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    architecture, changes = changes_of(path)
    config = model.config
    writer = gguf.GGUFWriter(folder / "whole.gguf", architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "num_experts"):
        writer.add_expert_count(config.num_experts)
    for name, change in changes.items():
        writer.add_tensor(name, change.contiguous().numpy())
    for write in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{write}")()
    writer.close()
    found = load_gguf_checkpoint(folder / "whole.gguf", return_tensors=True, model_to_load=model)
    return found["tensors"]


def changes(model, base):
    former = base.state_dict()
    merged = strip(copy.deepcopy(model), merge=True).state_dict()
    return {
        name: W - former[name] for name, W in merged.items() if not torch.equal(W, former[name])
    }


@pytest.mark.client("llama.cpp", rule="convert_lora_to_gguf.py of 0b03ada")
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_the_name_and_the_rows_that_llama_cpp_gives_it(name, tmp_path):
    make, architecture = MODELS[name]
    base = built(make)
    model = copy.deepcopy(base)
    exclude = ["shared_expert_gate"] if name == "qwen2_moe" else ()
    inject(model, "all-linear", r=2, alpha=5, exclude=exclude)
    if name.endswith("moe"):
        inject(model, [GATE_UP, DOWN, ROUTER], r=3, alpha=5)
    randomize_adapters(model)
    save(model, tmp_path / "a.gguf", format="gguf")
    assert tensors_of(tmp_path / "a.gguf")[0]["general.architecture"] == architecture
    expected = changes(model, base)
    found = by_transformers(tmp_path / "a.gguf", base, tmp_path)
    assert found.keys() == expected.keys()
    for key, change in expected.items():
        assert torch.allclose(torch.as_tensor(found[key]), change, atol=1e-6), key


@pytest.mark.client("llama.cpp", rule="convert_lora_to_gguf.py of 0b03ada")
def test_experts_of_mixtral_stand_in_one_tensor_for_all(tmp_path):
    base = built(mixtral)
    model = copy.deepcopy(base)
    inject(model, {GATE_UP: {"r": 2, "alpha": 2}, DOWN: {"r": 3, "alpha": 1}, ROUTER: {"r": 1}})
    randomize_adapters(model)
    save(model, tmp_path / "a.gguf", format="gguf")
    found, expected = changes_of(tmp_path / "a.gguf")[1], changes(model, base)
    layer = "model.layers.1.mlp"
    gate, up = expected[f"{layer}.experts.gate_up_proj"].chunk(2, dim=1)
    for own, change in {
        "ffn_gate_exps": gate, "ffn_up_exps": up,
        "ffn_down_exps": expected[f"{layer}.experts.down_proj"],
        "ffn_gate_inp": expected[f"{layer}.gate.weight"],
    }.items():  # fmt: skip
        assert torch.allclose(found[f"blk.1.{own}.weight"], change, atol=1e-6), own
    _, tensors = tensors_of(tmp_path / "a.gguf")
    assert tensors["blk.0.ffn_gate_exps.weight.lora_a"].shape == (4, 2, 16)
    assert tensors["blk.0.ffn_gate_exps.weight.lora_b"].shape == (4, 24, 2)
    assert len(found) == 2 * 4


def test_one_alpha_is_for_all_and_what_has_it_keeps_its_tensors(tmp_path):
    model = built(llama)
    targets = {"down_proj": {"r": 2, "alpha": 8}, "o_proj": {"r": 4, "alpha": 8}}
    inject(model, {**targets, "up_proj": {"r": 2, "alpha": 3, "scaling": "rslora"}})
    randomize_adapters(model)
    save(model, tmp_path / "a.gguf", format="gguf")
    said, tensors = tensors_of(tmp_path / "a.gguf")
    layer = model.model.layers[0]
    assert said["adapter.lora.alpha"] == 8
    for name, own in {
        "ffn_down": layer.mlp.down_proj,
        "attn_output": layer.self_attn.o_proj,
    }.items():
        assert torch.equal(tensors[f"blk.0.{name}.weight.lora_a"], own.lora_A)
        assert torch.equal(tensors[f"blk.0.{name}.weight.lora_b"], own.lora_B)
    up = layer.mlp.up_proj
    B = tensors["blk.0.ffn_up.weight.lora_b"]
    assert torch.allclose(B * 8 / 2, up.lora_B * 3 / 2**0.5)


def test_embeddings_and_head(tmp_path):
    base = built(llama)
    model = copy.deepcopy(base)
    inject(model, ["embed_tokens", "lm_head"], r=2, alpha=4)
    randomize_adapters(model)
    save(model, tmp_path / "a.gguf", format="gguf")
    _, tensors = tensors_of(tmp_path / "a.gguf")
    assert tensors["token_embd.weight.lora_a"].shape == (64, 2)
    found, expected = changes_of(tmp_path / "a.gguf")[1], changes(model, base)
    assert torch.allclose(
        found["token_embd.weight"], expected["model.embed_tokens.weight"], atol=1e-6
    )
    assert torch.allclose(found["output.weight"], expected["lm_head.weight"], atol=1e-6)


def test_the_command_converts_any_adapter_with_the_config_of_its_base(tmp_path, capsys):
    base = built(mixtral)
    base.config.architectures = ["MixtralForCausalLM"]
    base.config.save_pretrained(tmp_path / "base")
    names = ["w1", "w2", "w3"]
    write_old(tmp_path / "old", old_experts(base, "mixtral"), names)
    model = load(copy.deepcopy(base), tmp_path / "old")
    save(model, tmp_path / "ours")
    save(model, tmp_path / "portable", portable=True)
    save(model, tmp_path / "a.gguf", format="gguf")
    expected = changes_of(tmp_path / "a.gguf")[1]
    for source in ("old", "ours", "portable"):
        target = tmp_path / f"{source}.gguf"
        arguments = ["convert", str(tmp_path / source), str(target), "--to", "gguf"]
        assert main([*arguments, "--base", str(tmp_path / "base")]) == 0
        found = changes_of(target)[1]
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[k], v, atol=1e-4) for k, v in expected.items())
    assert main(arguments) == 2
    assert "--base CONFIG" in capsys.readouterr().err


REFUSED = {
    "another architecture": (bert, {"targets": "query"}, "BertModel is not known.*--base"),
    "biases": (lambda: MODELS["qwen2"][0](), {"targets": "q_proj", "bias": "lora_only"}, "bias"),
    "a norm": (llama, {"targets": "q_proj", "train_also": "norm"}, "trained in place"),
    "rows": (llama, {"targets": "q_proj", "rows": {"embed_tokens": [1]}}, "rows"),
    "dora": (llama, {"targets": "q_proj", "variant": "dora"}, "dora.*portable"),
    "a tied table": (lambda: MODELS["gemma2"][0](), {"targets": "embed_tokens"}, "tied"),
    "a gate of one row": (
        lambda: MODELS["qwen2_moe"][0](),
        {"targets": "shared_expert_gate"},
        "nothing that llama.cpp",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_refused(case, tmp_path):
    make, options, said = REFUSED[case]
    model = built(make)
    inject(model, r=2, **options)
    randomize_adapters(model)
    with pytest.raises(FormatError, match=f"(?s){said}"):
        save(model, tmp_path / "a.gguf", format="gguf")
    assert not [*tmp_path.iterdir()]


def test_a_dora_is_written_as_the_plain_lora_near_to_it(tmp_path):
    base = built(llama)
    model = copy.deepcopy(base)
    inject(model, "o_proj", r=2, variant="dora")
    randomize_adapters(model)
    save(model, tmp_path / "a.gguf", format="gguf", portable=True, r=16, error=0.1)
    found, expected = changes_of(tmp_path / "a.gguf")[1], changes(model, base)
    change = expected["model.layers.0.self_attn.o_proj.weight"]
    assert torch.allclose(found["blk.0.attn_output.weight"], change, atol=1e-5)


def test_a_gguf_file_is_not_read(tmp_path):
    model = built(llama)
    inject(model, "q_proj", r=2)
    randomize_adapters(model)
    save(model, tmp_path / "a.gguf", format="gguf")
    for format in (None, "gguf"):
        with pytest.raises(FormatError, match=r"not read|nothing tells"):
            load(built(llama), tmp_path / "a.gguf", format=format)
    with pytest.raises(FormatError, match="not read"):
        convert(tmp_path / "a.gguf", tmp_path / "b", "peft", format="gguf")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    model = built(llama)
    inject(model, "q_proj", r=2)
    randomize_adapters(model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatError, match=r"lora_inject\[gguf\]"):
        save(model, tmp_path / "a.gguf", format="gguf")
    assert not [*tmp_path.iterdir()]


def test_a_file_that_cannot_be_written_is_closed_and_leaves_the_former_one(tmp_path, monkeypatch):
    model, path = llama(), tmp_path / "a.gguf"
    inject(model, "q_proj", r=2)
    randomize_adapters(model)
    save(model, path, format="gguf")
    before, files = path.read_bytes(), []

    def full(self, **options):
        files.extend(self.fout)
        raise OSError("disk full")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(FormatError, match="disk full"):
        save(model, path, format="gguf")
    assert files
    assert all(file.closed for file in files)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]
