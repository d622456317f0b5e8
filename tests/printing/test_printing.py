"""Results for people: tables that fit, HTML that is a table, one line in the interpreter."""

import importlib
import pkgutil
import re
from html.parser import HTMLParser

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_inject
from lora_inject import inject, inspect, merge, plan, save
from lora_inject.printing import Section, Shown, Tables, show
from lora_inject.printing.sections import shortened
from lora_inject.printing.text import as_text

pytestmark = pytest.mark.cpu("tables are the same everywhere")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A plan with long paths, and what comes after it."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=64,
        )
    )  # fmt: skip
    model = nn.ModuleDict({"a_wrapper_with_a_long_name": nn.ModuleDict({"policy": model})})
    arguments = {"targets": ["q_proj", "down_proj"], "r": 4, "train_also": ["norm"]}
    planned = plan(model, **arguments, dropout={"input": 0.1, "rank": 0.1})
    reported = inject(model, **arguments, bias="lora_only")
    folder = tmp_path_factory.mktemp("adapter")
    with pytest.warns(lora_inject.LoRAInjectWarning, match="never trained"):
        save(model, folder)
    return {"plan": planned, "report": reported, "merge": merge(model), "file": inspect(folder)}


@pytest.mark.parametrize("name", ["plan", "report", "merge", "file"])
@pytest.mark.parametrize("columns", [80, 100, 120])
def test_a_table_fits_the_terminal_and_no_number_is_cut(results, name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    numbers = {name: re.findall(r"[\d,.]+", str(result)) for name, result in results.items()}
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = str(results[name])
    assert max(map(len, shown.splitlines())) <= columns
    if name == "report":  # nothing of it is left out
        assert re.findall(r"[\d,.]+", shown) == numbers[name]
    for line in shown.splitlines():
        if "parameters train" not in line and line.startswith(" lora_"):
            assert re.search(r"\d$", line)


def test_where_it_is_narrow_columns_are_spared_and_paths_lose_their_middle(results, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    narrow = str(results["plan"])
    assert "chosen by" not in narrow
    assert "..." in narrow
    assert "self_attn.q_proj" in narrow
    assert {"12", "3,072", "4,608"} <= set(narrow.split())
    monkeypatch.setenv("COLUMNS", "200")
    model = nn.Sequential(nn.Linear(8, 8))
    assert "chosen by" in str(plan(model, "0", r=2))
    assert max(map(len, str(results["plan"]).splitlines())) <= 120  # lines that can be read


def test_a_path_is_shortened_in_its_middle():
    assert shortened("layers.0.q_proj", 20) == "layers.0.q_proj"
    assert shortened("model.layers.{0..31}.self_attn.q_proj", 24) == "model.l...lf_attn.q_proj"


def test_layers_that_differ_in_their_numbers_alone_are_one_row(results):
    for name in ("plan", "merge", "file"):
        assert str(results[name]).count("layers.{0..11}.self_attn.q_proj") == 1
    assert len(str(results["file"]).splitlines()) < 30


def test_sections_stand_one_empty_line_apart_and_notes_are_a_list():
    sections = [
        Section("One", ("name", ">n"), [("a", "1")], ["a note " * 30, "another"]),
        Section("Two", (), (), ["alone"]),
    ]
    text = as_text(sections)
    assert "\n\n\n" not in text
    first, second, *_ = text.split("- ")[1:]
    assert all(line.startswith("  a") for line in first.strip().splitlines()[1:])
    assert second.startswith("another\n\nTwo\n\nalone")


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows = []

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_html_is_a_table_with_every_column(results):
    html = results["plan"]._repr_html_()
    assert "<pre" not in html
    cells = Cells()
    cells.feed(html)
    assert cells.rows[0] == [
        "path", "layer", "in x out", "r", "alpha", "layers", "parameters", "chosen by",
    ]  # fmt: skip
    assert cells.rows[1][1] == "Linear"
    assert "text-align:right" in html


def test_html_shows_what_is_written_and_runs_nothing():
    html = Tables([Section("<b>", ("<i>",), [("<script>",)], ["&"])]).html()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_result_is_one_short_line_in_the_interpreter(results):
    for result in results.values():
        assert "\n" not in repr(result)
        assert len(repr(result)) < 160
    assert re.fullmatch(r"<Report: ModuleDict: .* train \(.* %\)>", repr(results["report"]))


def test_every_report_has_that_line():
    for found in pkgutil.walk_packages(lora_inject.__path__, "lora_inject."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    reports = {cls for cls in Shown.__subclasses__() if cls.__module__.startswith("lora_inject")}
    own = {cls.__name__ for cls in reports if cls.__repr__ is not Shown.__repr__}
    assert own <= {"LoftQ"}  # a start, which says its arguments


def test_colours_are_for_terminals_alone(results, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(results["report"])
    assert "\x1b[" not in capsys.readouterr().out
    assert "\x1b[" not in str(results["report"])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    show(results["report"])
    trains = [line for line in capsys.readouterr().out.splitlines() if "lora_A" in line]
    assert all("\x1b[32m" in line for line in trains)
    assert "\x1b[" not in str(results["report"])
