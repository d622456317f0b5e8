"""The benchmark suite: its exact rows meet their goals, and its tables say what was measured."""

import importlib.metadata
import json
import os
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import __main__ as command
from benchmarks import clients, commands, compiled, experts, gpu, harness, memory
from benchmarks.bench import working
from benchmarks.harness import Result, Timings, as_section, interleaved
from benchmarks.limits import Ceilings, adapter_parts, adapter_passes
from benchmarks.ways import environment
from lora_inject import inject

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_bytes_kept_for_the_backward_pass_meet_their_goals():
    assert [result.workload for result in memory.saved(1) if not result.met] == []


def test_adapters_change_without_compiling_again():
    assert [result.value for result in compiled.changes(1)] == ["0 graph breaks, 0 recompiles"] * 2


def test_the_peak_is_of_what_lives_at_one_time():
    x = torch.ones(1000)

    def step():
        for _ in range(3):
            y = x + 1
            del y
        return (x + 1) + 1

    assert experts.peak_of(nn.Linear(1, 1), step) == 2 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_experts_keep_their_inputs_and_nothing_of_the_size_of_a_weight(dtype):
    sizes, tokens, r = experts.Sizes(8, 64, 32, 2), 16, 8
    floor = experts.FusedExperts(sizes, tokens, dtype).requires_grad_(False)
    x = torch.randn(tokens, sizes.hidden, dtype=dtype, requires_grad=True)
    least, kept = (memory.bytes_kept(lambda m=m: m(x)) for m in (floor, experts.adapted(floor, r)))
    inputs = tokens * sizes.top * (sizes.hidden + sizes.width + 2 * r) * dtype.itemsize
    assert kept <= least + inputs


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_injecting_takes_no_memory_but_the_adapters():
    (result,) = memory.peak_of_inject(1)
    assert result.met


def test_actions_take_turns_and_ratios_are_medians_within_a_round():
    order = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, 2)
    assert "".join(order) == "aabb" + "bbaa" + "aabb" + "bbaa"
    assert [len(timings.rounds[name]) for name in "ab"] == [3, 3]
    timings = Timings({"floor": [1.0, 10.0, 2.0], "ours": [2.0, 20.0, 9.0]})
    assert timings.ratio("ours", "floor") == 2
    assert timings.over("floor") == {"ours": 2}
    assert timings.spread("ours", "floor") == (2, 3.25)


def test_turns_end_with_their_time_and_contexts_stand_around_them():
    order = []

    @contextmanager
    def around():
        order.append("(")
        yield
        order.append(")")

    timings = interleaved({"a": lambda: order.append("a")}, 9, within=0, around={"a": around})
    assert "".join(order) == "(a)" * 4
    assert len(timings.rounds["a"]) == harness.FEWEST_ROUNDS


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Results go to a folder of the test."""
    for name in ("DATA", "TABLES", "CHART"):
        monkeypatch.setattr(harness, name, tmp_path / getattr(harness, name).name)


@pytest.mark.usefixtures("written")
def test_sections_are_written_one_by_one():
    good = Result("fast", "something", "1.1x", "<= 2x", True, {"ours": 1.1}, limit="1.0x")
    bad = Result("slow", "another", "3x", "<= 2x", False, profile="all of it is the kernel.")
    lines = {"quality": lambda found: [f"## Quality {found['x']}"]}
    harness.write("cpu", as_section([good, bad]), lines)
    harness.write("quality", {"x": 1}, lines)
    text = harness.TABLES.read_text()
    assert "| fast | something | 1.1x | <= 2x | yes | 1.0x |" in text
    assert "| slow | another | 3x | <= 2x | **no** |  |" in text
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


@pytest.mark.usefixtures("written")
def test_commands_are_timed_beside_others_and_published(monkeypatch):
    quick = [sys.executable, "-c", "sum(range(3_000_000))"]
    monkeypatch.setattr(commands, "COMMANDS", {"lora-inject demo": quick, "pytest": quick})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "commands", "tests"])
    command.main()
    alone, beside, tests = json.loads(harness.DATA.read_text())["commands"]["runs"]
    assert (alone["beside"], tests["beside"]) == (0, 0)
    assert beside["beside"] >= 4
    assert all(run["cpu"] > 0 and run["wall"] > 0 for run in (alone, beside, tests))
    assert beside["cpu"] < 10 * alone["cpu"]  # of the command, and not of those beside it
    assert "| `lora-inject demo` | no busy processes |" in harness.TABLES.read_text()


def run_gpu(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", *map(str, arguments)])
    command.main()


@pytest.mark.usefixtures("written")
def test_every_row_for_a_gpu_runs_and_is_published(tmp_path, monkeypatch, capsys):
    run_gpu(monkeypatch, "--out", tmp_path, "--device", "cpu", "--quick")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["errors"] == {}
    assert found["left_out"] == []
    assert list(found["seconds"]) == [row.name for row in gpu.ROWS]
    assert len(found["rows"]) >= len(gpu.ROWS)
    assert "failed" not in capsys.readouterr().out
    run_gpu(monkeypatch, "--publish", tmp_path)
    text = harness.TABLES.read_text()
    assert "## On a GPU: " in text
    assert "| layer | layer 32x32 bf16, 8 rows, r=16, forward + backward: p=0.1 | ours " in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_rows_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_gpu(monkeypatch, "--out", tmp_path / "results")
    (line,) = capsys.readouterr().err.splitlines()
    assert "add `--device cpu --quick`" in line
    assert not (tmp_path / "results").exists()


def stand_ins(monkeypatch):
    def fine(bench):
        yield Result("fine", "something", "1.0x", "<= 2x", True)

    def broken(bench):
        yield Result("broken", "its first line", "1.0x", "<= 2x", True)
        raise RuntimeError("out of luck\nand more")

    def endless(bench):
        yield Result("endless", "its first line", "1.0x", "<= 2x", True)
        time.sleep(60)

    rows = [gpu.GpuRow("broken", 0, broken), gpu.GpuRow("endless", 0.5, endless),
            gpu.GpuRow("fine", 20, fine), gpu.GpuRow("long", 400, fine)]  # fmt: skip
    monkeypatch.setattr(gpu, "_ceilings", lambda device, quick: Ceilings(1e9, 1e9))
    return rows


def test_a_failure_is_a_line_and_what_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    gpu.run(stand_ins(monkeypatch), tmp_path, "cpu", quick=True, minutes=(20 + 0.5 + 8) / 60)
    found = json.loads((tmp_path / "gpu.json").read_text())
    lines = [(row["row"], row["workload"], row["value"]) for row in found["rows"]]
    assert lines == [
        ("broken", "its first line", "1.0x"), ("broken", "failed", "RuntimeError: out of luck"),
        ("endless", "its first line", "1.0x"), lines[3], ("fine", "something", "1.0x"),
    ]  # fmt: skip
    assert lines[3][2].startswith("TimeoutError: stopped after ")
    assert "out of luck\nand more" in found["errors"]["broken"]
    assert found["left_out"] == ["long"]
    assert "Left out, as the time was over: long." in (tmp_path / "gpu.md").read_text()
    assert "are over: long" in capsys.readouterr().out


def test_a_peer_that_fails_is_said_and_ours_may_not():
    def fail():
        raise ValueError("no such shape\nsee above")

    steps = {"ours": lambda: None, "PEFT": fail}
    found, said = working(steps)
    assert list(found) == ["ours"]
    assert said == ["PEFT cannot: ValueError: no such shape"]
    with pytest.raises(ValueError, match="no such shape"):
        working({"ours": fail})


def test_the_passes_of_an_adapter_are_counted():
    passes = adapter_passes(rows=100, i=10, o=20, r=2)
    assert sum(p.operations for p in passes) == 6 * 100 * 2 * (10 + 20)
    activations = 2 * 100 * (4 * 10 + 3 * 20)  # bytes: x twice, dx twice; y twice, g
    assert sum(p.bytes for p in passes) == activations + 2 * (3 * 2 * 10 + 3 * 2 * 20)
    assert Ceilings(1e9, 1e12).seconds(passes) == sum(p.bytes for p in passes) / 1e9


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_parts_of_a_layer_are_what_it_computes(dropout):
    layer = nn.Linear(96, 64)
    inject(layer, nn.Linear, r=2, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    x, g = torch.randn(256, 96, requires_grad=True), torch.randn(256, 64)
    torch.manual_seed(3)  # for the mask
    expected = layer(x)
    expected.backward(g)
    torch.manual_seed(3)
    with torch.no_grad():
        y = F.linear(x, layer.weight, layer.bias)
        dx = adapter_parts(x, g, y, layer.lora_A, layer.lora_B, dropout)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx.addmm_(g, layer.weight), x.grad)


def test_the_limit_is_no_peer():
    timings = Timings({"floor": [1.0, 2.0], "ours": [3.0, 4.0], "limit": [2.0, 3.0]})
    assert timings.over("floor") == {"ours": 2.5}
    assert harness.limit_of(timings) == "1.75x floor"


def test_an_environment_variable_is_forced_for_a_while(monkeypatch):
    monkeypatch.delenv("SOME_SWITCH", raising=False)
    with environment("SOME_SWITCH", "on"):
        assert os.environ["SOME_SWITCH"] == "on"
    assert "SOME_SWITCH" not in os.environ


def test_clients_are_counted_by_what_their_tests_say(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "client = pytest.mark.client\n"
        "one, other = client('A', rule='1'), client('A', 'refused', rule='1')\n"
        "@one\ndef test_a(): pass\n"
        "@other\n@pytest.mark.client('torch', 'otherwise', what='a norm')\ndef test_b(): pass\n"
        "@one\ndef test_c(): assert 0\n"
        "@one\ndef test_d(): pytest.skip('gone')\n"
        "def test_e(): assert 0\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = client: x\n")
    monkeypatch.setattr(clients, "TESTS", tmp_path / "tests")
    rows = {row["client"]: row for row in clients.measure([str(tmp_path)])["rows"]}
    assert rows["A"]["cases"] == {"equal": 1, "refused": 1, "failed": 1, "not run": 1}
    assert rows["torch"]["version"] == importlib.metadata.version("torch")
    text = "\n".join(clients.lines({"rows": [*rows.values()]}))
    assert "| A | 1, its rule | 1 | 1 | 0 | 1 | 1 |" in text
    assert "- torch, otherwise: a norm" in text
    assert "- A, failed: test c" in text
