"""The command line: what it prints, and one-line errors with exit code 2."""

import contextlib
import importlib.metadata
import json
import re
import signal
import subprocess
import sys

import pytest
import torch
import transformers as tf
from helpers import randomize_adapters
from transformers import GPT2Config, LlamaConfig

import lora_inject
from lora_inject import inject, load, lora_state_dict, save, strip
from lora_inject.cli import main as commands
from lora_inject.cli.main import main
from lora_inject.files.formats import FORMATS
from lora_inject.files.formats.storage import read_tensors
from lora_inject.report.bytes import OPTIMIZER_STATES
from lora_inject.settings import DTYPES

pytestmark = pytest.mark.cpu("commands compute nothing")


@pytest.fixture(autouse=True)
def _nothing_takes_long(monkeypatch):
    """On a machine at work too, standard error has what the tests ask for alone."""
    monkeypatch.setattr("lora_inject.printing.progress.PAUSE", 600.0)


def small_model():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))


NOT_A_MODEL = 3


def adapted():
    model = small_model()
    inject(model, "0", r=2)
    return model, torch.ones(3, 4)


def thawed():
    model, batch = adapted()
    model[1].requires_grad_(True)
    return model, batch, torch.optim.SGD(model.parameters(), lr=0.1)


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
    LLAMA_405B.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "-r", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["frozen"] == 405_853_388_800


def test_audit_says_what_is_wrong_by_its_exit_code(capsys):
    assert main(["audit", f"{__name__}:adapted"]) == 0
    assert "on one batch: nothing found." in capsys.readouterr().out
    assert main(["audit", f"{__name__}:thawed"]) == 1
    assert "optimized-frozen" in capsys.readouterr().out
    assert main(["audit", f"{__name__}:thawed", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["code"] == "thawed"
    assert main(["audit", f"{__name__}:small_model"]) == 1
    assert "as it stands" in capsys.readouterr().out
    assert main(["audit", f"{__name__}:NOT_A_MODEL"]) == 2
    assert "gives a int, not an nn.Module" in capsys.readouterr().err
    assert main(["audit", "."]) == 2  # a directory, which can be planned alone
    assert "'.' is no package.module:callable. Give a function" in capsys.readouterr().err


CAPACITY = ["--dtype", "bf16", "--fsdp", "8", "--tp", "2", "--seq", "4096", "--batch", "1"]
LLAMA_405B = LlamaConfig(
    architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=53248,
    num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, vocab_size=128256,
    max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip


def test_capacity_of_a_llama_with_405_billion_parameters(tmp_path, capsys):
    LLAMA_405B.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), *CAPACITY, "--checkpointing", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    needed = shown["capacity"]
    assert shown["memory"]["frozen"]["weights"] == {"bfloat16": 2 * 405_853_388_800}
    assert shown["memory"]["trainable"]["weights"].keys() == {"float32"}
    assert needed["base"] == pytest.approx(2 * 405_853_388_800 / 16, rel=1e-3)
    assert needed["inputs"] == {"input_ids": [1, 4096], "labels": [1, 4096]}
    lines = ("base", "adapters", "gradients", "states", "gathered", "activations", "working")
    assert needed["total"] == sum(needed[line] for line in lines)
    # one block's input for each of 126 blocks, of 4096 tokens with 16384 features of 2 bytes
    assert needed["activations"] > 126 * 4096 * 16384 * 2
    assert [fit["device"] for fit in needed["fits"]] == ["80 GB", "141 GB"]


FAMILIES = {
    "Llama 8B": LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    ),
    "Llama 70B": LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=8192, intermediate_size=28672,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
    ),
    "Mixtral 8x22B": tf.MixtralConfig(
        architectures=["MixtralForCausalLM"], hidden_size=6144, intermediate_size=16384,
        num_hidden_layers=56, num_attention_heads=48, num_key_value_heads=8,
    ),
    "Qwen3-MoE 235B": tf.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=4096, moe_intermediate_size=1536,
        num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8,
    ),
    "DeepSeek-V3": tf.DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]),
    "Gemma3": tf.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]),
    "GPT-OSS 120B": tf.GptOssConfig(architectures=["GptOssForCausalLM"]),
    "T5": tf.T5Config(architectures=["T5ForConditionalGeneration"]),
    "BERT": tf.BertConfig(architectures=["BertForMaskedLM"]),
    "ViT": tf.ViTConfig(architectures=["ViTForImageClassification"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_capacity_of_real_sizes(name, tmp_path, capsys):
    FAMILIES[name].save_pretrained(tmp_path)
    seq = [] if name == "ViT" else ["--seq", "512"]
    options = ["--dtype", "bf16", "--fsdp", "8", *seq, "--json"]
    assert main(["plan", str(tmp_path), *options]) == 0
    shown = json.loads(capsys.readouterr().out)
    needed = shown["capacity"]
    assert needed["base"] == pytest.approx(2 * shown["frozen"] / 8, rel=0.02)
    assert needed["activations"] > 0
    assert all(fit["devices"] for fit in needed["fits"])


def test_capacity_is_shown_below_the_plan_and_only_when_it_is_asked_for(config, capsys):
    assert main(["plan", str(config)]) == 0
    plain = capsys.readouterr().out.rstrip()
    assert main(["plan", str(config), "--seq", "64"]) == 0
    with_capacity = capsys.readouterr().out
    assert with_capacity.startswith(plain)
    assert "Smallest number of devices" in with_capacity
    assert "Smallest number of devices" not in plain
    assert main(["plan", str(config), "--dtype", "fp16"]) == 0
    assert "float16" in capsys.readouterr().out


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
        ([f"{__name__}:small_model", "--fsdp", "0"], "fsdp must be an integer"),
        ([f"{__name__}:small_model", "--seq", "8"], "nothing tells what Sequential reads"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("lora-inject: error: ")
    assert message in captured.err


@pytest.mark.parametrize("option", [["--fsdp", "x"], ["--seq", "1.5"], ["--dtype", "int8"]])
def test_options_of_the_wrong_type_are_one_line_too(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", f"{__name__}:small_model", *option])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"argument {option[0]}" in error


def test_a_broken_config(tmp_path, capsys):
    for content in ("{", "{}", '{"model_type": "no_such_model"}', "[]", ""):
        (tmp_path / "config.json").write_text(content)
        assert main(["plan", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("lora-inject: error: MODEL")


def test_the_directory_of_an_adapter_is_no_model(tmp_path, capsys):
    save(adapted()[0], tmp_path)
    assert main(["plan", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds an adapter" in said
    assert "lora-inject inspect" in said


def test_without_a_command_it_says_what_there_is_and_its_version(capsys):
    assert main([]) == 0
    assert {"plan", "inspect", "convert", "demo"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    shown = capsys.readouterr().out
    own, of_torch = lora_inject.__version__, importlib.metadata.version("torch")
    assert shown.startswith(f"lora_inject {own} (torch {of_torch}")


def test_words_of_options_are_those_of_the_library():
    assert tuple(FORMATS) == commands.FORMATS
    assert tuple(OPTIMIZER_STATES) == commands.OPTIMIZERS
    assert set(commands.DTYPES) <= set(DTYPES)


@pytest.mark.parametrize("arguments", ["['--help']", "['plan', '--help']", "['convert', 'x']"])
def test_help_and_mistakes_are_answered_without_torch(arguments):
    code = (
        "import sys\nfrom lora_inject.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")


def test_what_takes_long_is_said_beside_what_is_printed(config, capsys, monkeypatch):
    monkeypatch.setattr("lora_inject.printing.progress.PAUSE", 0.001)
    assert main(["plan", str(config), "--seq", "64", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["capacity"]
    assert "running its forward on the meta device ... 0 s" in captured.err


def test_the_memory_of_devices_is_in_one_unit_and_explained(config, capsys):
    assert main(["plan", str(config), "--seq", "64"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "device reports usable devices" in shown
    assert "80 GB 84.83 GB 80.58 GB" in shown
    assert "one sold as 80 GB has 79 GiB, which are 84.83 GB" in shown


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


def test_inspect_says_what_a_file_leaves_out_and_what_is_no_adapter_in_it(tmp_path, capsys):
    model = small_model()
    inject(model, "0", r=2)
    save(model, tmp_path / "a.pt", format="loralib")
    (tmp_path / "whole").mkdir()
    torch.save(model.state_dict(), tmp_path / "whole" / "pytorch_model.bin")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 0
    assert "not in the file: say alpha= where it is loaded" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "whole")]) == 0
    out = capsys.readouterr().out
    assert "Other weights, of the model" in out
    assert "Trained in place" not in out


def test_output_that_nobody_reads_to_its_end_is_no_error(adapter):
    command = [sys.executable, "-m", "lora_inject", "inspect", str(adapter)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as head does when it has its lines
    lines = process.stderr.read().splitlines()
    process.stderr.close()
    assert [line for line in lines if not line.startswith(b"importing torch ... ")] == []
    assert process.wait() == 128 + signal.SIGPIPE


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_inject.cli.commands.load_model", interrupted)
    assert main(["plan", "anything"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "lora-inject: interrupted\n"


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


def test_a_model_with_a_module_called_as_a_component_converts_to_diffusers(tmp_path, capsys):
    model = tf.GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    )
    inject(model, "c_attn", r=2)
    randomize_adapters(model)
    save(model, tmp_path / "peft")
    command = ["convert", str(tmp_path / "peft"), str(tmp_path / "diffusers"), "--to", "diffusers"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search("format +diffusers", shown)
    assert "transformer.h.{0..1}.attn.c_attn" in shown
    assert main(["inspect", str(tmp_path / "diffusers")]) == 0
    assert capsys.readouterr().out == shown
    own = lora_state_dict(model)
    loaded = lora_state_dict(load(strip(model), tmp_path / "diffusers"))
    assert all(torch.equal(loaded[key], value) for key, value in own.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "no file or directory nowhere"),
        (["convert", "{}", "x", "--to", "zip"], "invalid choice"),
        (["convert", "{}/k.safetensors", "{}/x", "--to", "peft"], "--model CONFIG"),
        (["convert", "{}/l.pt", "{}/x", "--to", "peft"], "alpha=16"),
        (
            ["convert", "{}/h.pt", "{}/x", "--to", "peft", "--alpha", "3"],
            "holds 1.bias, 1.weight. Load it into its model, and save it there.",
        ),
        (["inspect", "{}"], "holds no adapter: there is neither adapter_config.json (PEFT) nor"),
        (["inspect", "{}/peft/adapter_config.json"], "Give the directory that it is in."),
        (["inspect", "{}/k.txt"], "If it is an adapter, say what it is: one of peft, loralib"),
    ],
)
def test_file_commands_fail_in_one_line(arguments, message, capsys, tmp_path):
    model = small_model()
    inject(model, "0", r=2)
    save(model, tmp_path / "k.safetensors", format="kohya")
    save(model, tmp_path / "l.pt", format="loralib")
    save(model, tmp_path / "peft")
    (tmp_path / "k.txt").write_text("words")
    model = small_model()
    inject(model, "0", r=2, train_also="1")
    save(model, tmp_path / "h.pt", format="loralib")
    with contextlib.suppress(SystemExit):
        assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "x").exists()
