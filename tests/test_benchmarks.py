"""The benchmark suite: its exact rows meet their goals, and its tables say what was measured."""

import json
import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import arithmetic, compiled, harness, memory
from benchmarks.harness import REGISTRY, Result, Timings, as_section, interleaved

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_bytes_kept_for_the_backward_pass_meet_their_goals():
    assert [result.workload for result in memory.saved(1) if not result.met] == []


def test_adapters_change_without_compiling_again():
    assert [result.value for result in compiled.changes(1)] == ["0 graph breaks, 0 recompiles"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_injecting_takes_no_memory_but_the_adapters():
    (result,) = memory.peak_of_inject(1)
    assert result.met


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_row_that_has_not_run_on_a_gpu_says_so():
    assert [result.met for result in REGISTRY["h200"].measure(1)] == [None] * 3
    assert "| no GPU here |" in "\n".join(harness.table(arithmetic.large_on_a_gpu(1)))


def test_actions_take_turns_and_ratios_are_medians_within_a_round():
    order = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, 2)
    assert "".join(order) == "aabb" + "bbaa" + "aabb" + "bbaa"
    assert [len(timings.rounds[name]) for name in "ab"] == [3, 3]
    timings = Timings({"floor": [1.0, 10.0, 2.0], "ours": [2.0, 20.0, 9.0]})
    assert timings.ratio("ours", "floor") == 2
    assert timings.over("floor") == {"ours": 2}


def test_sections_are_written_one_by_one(tmp_path, monkeypatch):
    for name in ("DATA", "TABLES", "CHART"):
        monkeypatch.setattr(harness, name, tmp_path / getattr(harness, name).name)
    good = Result("fast", "something", "1.1x", "<= 2x", True, {"ours": 1.1, "PEFT": 2.0})
    bad = Result("slow", "another", "3x", "<= 2x", False, profile="all of it is the kernel.")
    harness.write("cpu", as_section([good, bad]), lambda found: [])
    harness.write("quality", {"x": 1}, lambda found: [f"## Quality {found['x']}"])
    text = harness.TABLES.read_text()
    assert "| fast | something | 1.1x | <= 2x | yes |" in text
    assert "| slow | another | 3x | <= 2x | **no** |" in text
    assert "- slow, another: all of it is the kernel." in text
    assert text.endswith("## Quality 1\n")
    assert json.loads(harness.DATA.read_text()).keys() == {"cpu", "quality"}
    assert harness.CHART.read_bytes().startswith(b"\x89PNG")


def test_a_row_runs_alone_and_a_quick_run_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(command, "write", None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "decode", "--quick"])
    command.main()
    assert "decode   one row through a layer of 64x64" in capsys.readouterr().out


def test_an_unknown_row_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "no such row: nothing; there are" in capsys.readouterr().err
