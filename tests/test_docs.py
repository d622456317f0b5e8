"""The documentation is true: README snippets run, its report is what prints, docstrings pass."""

import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from families import llama
from ranks import on_ranks
from torch import nn
from transformers import LlamaConfig

import lora_inject
from lora_inject.cli.main import main

pytestmark = pytest.mark.cpu("the examples are the same everywhere")

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(lora_inject.__path__, "lora_inject.")
    if not found.name.endswith("__main__")
]


ON_RANKS = r"<!-- on two ranks -->\n```python\n(.*?)```"


def snippets(language):
    return re.findall(
        rf"```{language}\n(.*?)```", re.sub(ON_RANKS, "", README, flags=re.DOTALL), re.DOTALL
    )


def test_the_snippets_of_the_readme_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they save files
    first, *rest = snippets("python")
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    exec(first, {"model": model})
    space = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for snippet in rest:
            exec(snippet, space)
    (shown,) = [text.strip() for text in snippets("text")]
    assert shown in printed.getvalue()
    assert "\n124439808\n" in printed.getvalue()


def run_on_a_rank(snippet, folder):
    os.chdir(folder)
    try:
        exec(snippet, {"model": llama(), "tokens": torch.randint(60, (2, 7))})
    finally:
        os.chdir("/")


@pytest.mark.distributed
@pytest.mark.parametrize("snippet", re.findall(ON_RANKS, README, re.DOTALL), ids=["fsdp", "tp"])
def test_the_snippets_for_many_devices_run_on_two_ranks(snippet, tmp_path):
    on_ranks(2, run_on_a_rank, snippet, str(tmp_path))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_capacity_in_the_readme_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=53248,
        num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=131072, tie_word_embeddings=False,
    ).save_pretrained("llama-3.1-405b")  # fmt: skip
    (snippet,) = snippets("console")
    command, shown = snippet.replace("\\\n", "").split("\n", 1)
    assert main(command.split()[2:]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{shown}")


def test_the_grammar_table_of_the_readme_selects():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": model})])})
    for target in ("q_proj", "self_attn.q_proj", r"re:.*\.(q|v)_proj", nn.Linear, "all-linear"):
        assert lora_inject.plan(model, target).sites


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    space = {"torch": torch, "nn": nn, **vars(lora_inject), **vars(module)}
    failed, _ = doctest.testmod(module, globs=space, optionflags=doctest.ELLIPSIS)
    assert failed == 0


PUBLIC = [
    value for name in lora_inject.__all__ if inspect.isfunction(value := getattr(lora_inject, name))
]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_public_docstrings_name_every_argument(function):
    documented = inspect.getdoc(function)
    assert "Example:" in documented
    arguments = list(inspect.signature(function).parameters)
    if len(arguments) > 1:
        section = documented.split("Args:")[1].split("Returns:")[0].split("Raises:")[0]
        assert re.findall(r"^    (\w+): ", section, re.MULTILINE) == arguments


def test_every_module_says_its_job():
    assert all(module.__doc__ and module.__doc__.strip() for module in MODULES)


def test_the_tests_that_reports_name_are_there():
    tests = Path(__file__).parent
    there = "\n".join(file.read_text(encoding="utf-8") for file in tests.rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", (tests / "README.md").read_text("utf-8")):
        assert f"def {name}" in there
