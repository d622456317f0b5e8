"""The documentation is true: what README and guide show runs and prints that; docstrings pass."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from families import llama
from ranks import on_ranks
from torch import nn
from transformers import LlamaConfig

import lora_inject
from lora_inject.cli.main import main

pytestmark = pytest.mark.cpu("the examples are the same everywhere")

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "lora_inject" / "guide"
PAGES = [README, *sorted(GUIDE.glob("*.md"))]
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(lora_inject.__path__, "lora_inject.")
    if not found.name.endswith("__main__")
]


class Block(NamedTuple):
    """A fenced block: what the comment above it says (or nothing), its language, its text."""

    mark: str
    language: str
    text: str


def blocks(page):
    found = re.findall(
        r"(?:<!-- ([^>]*) -->\n)?^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [Block(*each) for each in found]


def marked(page, mark):
    (block,) = [block for block in blocks(page) if block.mark == mark]
    return block.text


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # they save files
    space = {}
    for mark, language, text in blocks(page):
        if language == "python" and mark != "on two ranks":
            exec(text, space)
        if language == "bash":
            for line in text.splitlines():
                assert main(line.removeprefix("lora-inject ").split()) == 0
    printed = capsys.readouterr().out
    for block in blocks(page):
        assert block.language != "text" or block.text.strip() in printed
    if page.stem == "five_minutes":
        assert "\n124439808\n" in printed


def test_the_short_snippets_of_the_readme_run():
    first, undo = [b.text for b in blocks(README) if b.language == "python" and not b.mark]
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    exec(first, {"model": model})
    exec(undo, {})


@pytest.mark.usefixtures("demo_packages")
def test_the_story_of_the_readme_is_true_in_two_processes(tmp_path):
    def run(name):
        (tmp_path / name).write_text(marked(README, name))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, name]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert marked(README, "report").strip() in run("train.py")
    good, bad, *again = map(float, re.findall(r"-?\d+\.\d+", run("predict.py")))
    said = re.search(r"# tensor\(\[ ?(.*), (.*)\]\)", marked(README, "predict.py"))
    assert [good, bad] == pytest.approx([float(said[1]), float(said[2])], abs=0.5)
    assert again == pytest.approx([good, bad], abs=1e-3)


def test_every_link_and_every_page_is_found():
    targets = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())
    }
    assert [str(target) for target in targets if not target.is_file()] == []
    assert set(PAGES[1:]) <= targets


def test_what_the_readme_says_of_peft_is_on_the_page_for_it():
    section = README.read_text().split("## Coming from PEFT")[1].split("\n## ")[0]
    rows = {line for line in section.splitlines() if line.startswith("|")}
    assert rows <= set((GUIDE / "from_peft.md").read_text().splitlines())


def test_every_public_function_is_in_the_readme_or_the_guide():
    said = "".join(page.read_text() for page in PAGES)
    aliases = {"mark_only_lora_as_trainable"}  # loralib's name for freeze
    missing = [f.__name__ for f in PUBLIC if not re.search(rf"\b{f.__name__}\b", said)]
    assert set(missing) <= aliases


def test_the_figures_of_the_readme_are_in_the_results_and_name_their_command():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    measured = [p for p in README.read_text().split("\n\n") if "`python -m benchmarks" in p]
    figures = [f for p in measured for f in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", p)]
    assert len(figures) > 2
    assert [figure for figure in figures if figure not in results] == []


ON_RANKS = [b.text for b in blocks(GUIDE / "many_devices.md") if b.mark == "on two ranks"]


def run_on_a_rank(snippet, folder):
    os.chdir(folder)
    try:
        exec(snippet, {"model": llama(), "tokens": torch.randint(60, (2, 7))})
    finally:
        os.chdir("/")


@pytest.mark.distributed
@pytest.mark.parametrize("snippet", ON_RANKS, ids=["fsdp", "tp"])
def test_the_snippets_for_many_devices_run_on_two_ranks(snippet, tmp_path):
    on_ranks(2, run_on_a_rank, snippet, str(tmp_path))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_capacity_in_the_guide_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=16384, intermediate_size=53248,
        num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=131072, tie_word_embeddings=False,
    ).save_pretrained("llama-3.1-405b")  # fmt: skip
    (snippet,) = [b.text for b in blocks(GUIDE / "memory.md") if b.language == "console"]
    command, shown = snippet.replace("\\\n", "").split("\n", 1)
    assert main(command.split()[2:]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{shown}")


def test_the_grammar_table_of_the_guide_selects():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": model})])})
    for target in ("q_proj", "self_attn.q_proj", r"re:.*\.(q|v)_proj", nn.Linear, "all-linear"):
        assert lora_inject.plan(model, target).sites


PUBLIC_NAMES = {name: getattr(lora_inject, name) for name in lora_inject.__all__}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    space = {"torch": torch, "nn": nn, **PUBLIC_NAMES, **vars(module)}
    failed, _ = doctest.testmod(module, globs=space, optionflags=doctest.ELLIPSIS)
    assert failed == 0


PUBLIC = [value for value in PUBLIC_NAMES.values() if inspect.isfunction(value)]


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
    table = (tests / "README.md").read_text("utf-8")
    for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", table):
        assert f"def {name}" in there
    for file in re.findall(r"`([\w/]*test_\w+\.py)`", table):
        assert (tests / file).exists(), file
