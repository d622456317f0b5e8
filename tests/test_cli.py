"""The command line: what it prints, and one-line errors with exit code 2."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from lora_inject import inject, save
from lora_inject.cli import main
from lora_inject.formats.storage import read_tensors


def small_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))


NOT_A_MODEL = 3


@pytest.fixture
def config(tmp_path):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["", "config.json"])
def test_plan_of_a_config(config, capsys, name):
    assert main(["plan", str(config / name), "--targets", "c_attn", "-r", "4"]) == 0
    out = capsys.readouterr().out
    for part in ("transformer.h.{0..11}.attn.c_attn", "147,456 of 124,587,264", "844 times"):
        assert part in out


def test_plan_as_json(config, capsys):
    assert main(["plan", str(config), "--targets", "c_attn", "-r", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == 147_456


def test_plan_of_a_llama_with_405_billion_parameters(tmp_path, capsys):
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=53248,
        num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, vocab_size=128256,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    assert main(["plan", str(tmp_path), "-r", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frozen"] == 405_853_388_800


def test_plan_of_a_callable(capsys):
    assert main(["plan", f"{__name__}:small_model", "--targets", "0", "--optimizer", "sgd"]) == 0
    assert "Sequential: 64 of 94 parameters train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no file or directory 'nowhere'"),
        (["no_such_module:f"], "cannot be built"),
        ([f"{__name__}:missing"], "cannot be built"),
        ([f"{__name__}:NOT_A_MODEL"], "gives a int"),
        ([f"{__name__}:small_model", "--targets", "q_porj"], "'q_porj' matches nothing"),
        ([f"{__name__}:small_model", "-r", "0"], "r must be an integer"),
        ([f"{__name__}:small_model", "--bias", "some"], "bias must be one of"),
        ([f"{__name__}:small_model", "--optimizer", "x"], "optimizer must be one of"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("lora-inject: error: ")
    assert message in captured.err


def test_a_broken_config(tmp_path, capsys):
    for content in ("{", "{}", '{"model_type": "no_such_model"}', "[]", ""):
        (tmp_path / "config.json").write_text(content)
        assert main(["plan", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("lora-inject: error: MODEL")


def test_as_a_module_and_what_importing_costs():
    code = "import sys, lora_inject; print([m for m in ('transformers', 'rich', 'safetensors') " \
        "if m in sys.modules])"  # fmt: skip
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
    shown = subprocess.run(
        [sys.executable, "-m", "lora_inject", "--help"], capture_output=True, text=True, check=True
    )
    assert "plan" in shown.stdout
    assert "demo" in shown.stdout


@pytest.fixture
def adapter(tmp_path):
    model = small_model()
    inject(model, ["0", "1"], r=2, alpha=3)
    save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_inspect(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    for part in ("PEFT", "fingerprint of the base", "linear", "float32", "norm of s B A"):
        assert part in out
    assert main(["inspect", str(adapter), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(pair["name"], pair["rank"], pair["alpha"]) for pair in shown["pairs"]] == [
        ("0", 2, 3), ("1", 2, 3),
    ]  # fmt: skip
    assert shown["elements"] == 2 * (4 + 4) + 2 * (4 + 2)
    assert shown["pairs"][0]["norm"] == 0.0


def test_convert_there_and_back(adapter, capsys, tmp_path):
    own = f"{__name__}:small_model"
    steps = [
        ("adapter", "a.pt", ["--to", "loralib"]),
        ("a.pt", "b", ["--to", "diffusers", "--alpha", "3"]),
        ("b", "c.safetensors", ["--to", "kohya"]),
        ("c.safetensors", "d", ["--to", "peft", "--model", own]),
    ]
    for source, target, options in steps:
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), *options]) == 0
    first, last = (read_tensors(tmp_path / d / "adapter_model.safetensors")[0]
                   for d in ("adapter", "d"))  # fmt: skip
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)
    config = json.loads((tmp_path / "d" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert "PEFT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "no file or directory nowhere"),
        (["convert", "{}", "x", "--to", "zip"], "invalid choice"),
        (["convert", "{}/k.safetensors", "{}/x", "--to", "peft"], "--model CONFIG"),
        (["convert", "{}/l.pt", "{}/x", "--to", "peft"], "alpha=16"),
    ],
)
def test_file_commands_fail_in_one_line(arguments, message, capsys, tmp_path):
    model = small_model()
    inject(model, "0", r=2)
    save(model, tmp_path / "k.safetensors", format="kohya")
    save(model, tmp_path / "l.pt", format="loralib")
    with contextlib.suppress(SystemExit):
        assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "x").exists()
