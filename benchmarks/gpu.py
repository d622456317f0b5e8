"""``python -m benchmarks gpu --out DIR --minutes 4``: the rows for a GPU, within a time.

Each line stands in DIR/gpu.json and DIR/gpu.md as soon as it is measured. Rows go in their order;
what does not fit in the minutes is left out, last first, and named. ``--publish DIR`` puts what was
measured into RESULTS.md. ``--device cpu --quick`` runs every row at a tiny size: to see that it
runs, the figures mean nothing then.
"""

import argparse
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_blocks, gpu_layers, gpu_models
from benchmarks.bench import Bench
from benchmarks.harness import Result, event_seconds, machine, seconds, table
from benchmarks.limits import Ceilings, measured_ceilings
from benchmarks.quality import one_thread

START = 20.0  # seconds for what comes before the first row: libraries, the device, its ceilings
MARGIN = 1.0  # seconds that stopping a row may take


@dataclass(frozen=True)
class GpuRow:
    """Some lines, and about how many seconds they take on a large GPU."""

    name: str
    seconds: float
    measure: Callable[[Bench], Iterator[Result]]


ROWS = [
    GpuRow("layer p=0", 6, partial(gpu_layers.layer, dropout=0.0, wide=False, goal=1.18)),
    GpuRow("layer p=0.1", 6, partial(gpu_layers.layer, dropout=0.1, wide=False, goal=1.20)),
    GpuRow("layer fp32 adapters", 6, partial(gpu_layers.layer, dropout=0.0, wide=True, goal=1.20)),
    GpuRow("experts", 12, gpu_layers.experts),
    GpuRow("block", 8, partial(gpu_blocks.block, checkpointing=False)),
    GpuRow("block checkpointed", 8, partial(gpu_blocks.block, checkpointing=True)),
    GpuRow("shared input", 6, gpu_blocks.shared),
    GpuRow("decode", 8, partial(gpu_blocks.decode, graphs=False)),
    GpuRow("decode in graphs", 6, partial(gpu_blocks.decode, graphs=True)),
    GpuRow("per-row", 20, gpu_layers.rows_with_adapters),
    GpuRow("verbs", 30, gpu_models.verbs),
    GpuRow("compile layer", 20, partial(gpu_blocks.compiled, whole=False)),
    GpuRow("compile block", 45, partial(gpu_blocks.compiled, whole=True)),
    GpuRow("training", 10, gpu_models.training),
    GpuRow("capacity", 8, gpu_models.predicted_memory),
]


def main(arguments: list[str], publish: Callable[[dict[str, Any]], object]) -> None:
    """Measure, or publish what was measured.

    Args:
        arguments: of the command line.
        publish: takes the section of the results.
    """
    options = _options(arguments)
    if options.publish:
        publish(json.loads(Path(options.publish, "gpu.json").read_text()))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(
            "benchmarks gpu: torch sees no GPU here; run it where one is, or add "
            "`--device cpu --quick` to see that the rows run.\n"
        )
        sys.exit(2)
    chosen = [row for row in ROWS if not options.rows or row.name in options.rows]
    run(chosen, Path(options.out), options.device, options.quick, options.minutes)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", metavar="DIR", help="where to write gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no row starts that would "
                        "end later; default: all rows")  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="ROW",
                        help=f"only these: {', '.join(row.name for row in ROWS)}")  # fmt: skip
    parser.add_argument("--publish", metavar="DIR", help="put DIR/gpu.json into RESULTS.md")
    options = parser.parse_args(arguments)
    if not (options.out or options.publish):
        parser.error("--out DIR is needed, or --publish DIR")
    if options.device == "cpu" and not options.quick:
        parser.error("on the CPU the rows run with --quick only")
    return options


def run(rows: list[GpuRow], folder: Path, device: str, quick: bool, minutes: float) -> None:
    """Measure rows until the time is over, and write down each line at once."""
    deadline = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    planned = _fitting(rows, 60 * minutes - START)
    print(f"planned: {', '.join(row.name for row in planned)}", flush=True)
    with one_thread() if device == "cpu" else nullcontext():
        bench = Bench(device, quick, _ceilings(device, quick))
        found = _head(bench, minutes)
        for i, row in enumerate(rows):
            left = deadline - time.monotonic()
            fitting = _fitting(rows[i:], left)
            if not fitting:
                found["left_out"] = [r.name for r in rows[i:]]
                break
            # A row may take longer than was thought, but not the time of those after it.
            limit = left - sum(r.seconds for r in fitting[1:]) - MARGIN
            _measure(row, bench, limit, found, folder)
    _write(found, folder)
    if found["left_out"]:
        print(f"left out, as the {minutes:g} minutes are over: {', '.join(found['left_out'])}")


def _fitting(rows: list[GpuRow], budget: float) -> list[GpuRow]:
    """The first rows, as many as fit."""
    return [row for i, row in enumerate(rows) if sum(r.seconds for r in rows[: i + 1]) <= budget]


def _ceilings(device: str, quick: bool) -> Ceilings:
    clock = event_seconds if device == "cuda" else seconds
    elements, d = (1 << 20, 256) if quick else (1 << 30, 8192)
    return measured_ceilings(device, clock, elements, d)


def _measure(row: GpuRow, bench: Bench, limit: float, found: dict[str, Any], folder: Path) -> None:
    """Add the lines of a row to what was found; a failure is a line too."""
    started = time.monotonic()

    def add(result: Result) -> None:
        found["rows"].append(asdict(result))
        _write(found, folder)
        print(_shown(result), flush=True)

    try:
        with _at_most(limit):
            bench.collect()  # after the row before
            torch.manual_seed(0)
            for result in row.measure(bench):
                add(result)
    except Exception as error:
        found["errors"][row.name] = traceback.format_exc()
        text = (str(error).strip() or "no message").splitlines()[0][:200]
        add(Result(row.name, "failed", f"{type(error).__name__}: {text}", "", False))
    found["seconds"][row.name] = round(time.monotonic() - started, 1)


def _shown(result: Result) -> str:
    """A line in short: the first of what was measured, and whether that is the goal."""
    met = {True: "met", False: "NOT met", None: "not run"}[result.met]
    goal = f"{met}: {result.goal}; limit {result.limit or '-'}"
    return f"{result.row:12} {result.workload}\n    {result.value[:150]}\n    {goal}"


@contextmanager
def _at_most(limit: float) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds, where the system has such alarms."""
    if math.isinf(limit) or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {limit:.0f} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    # And again each second: what is raised while garbage is collected is lost.
    timer = signal.setitimer(signal.ITIMER_REAL, limit, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def _head(bench: Bench, minutes: float) -> dict[str, Any]:
    """The section without its rows: where, when, how."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("peft", "triton"):
        if find_spec(name):
            versions[name] = __import__(name).__version__
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions,
        "command": f"python -m benchmarks gpu --out DIR --minutes {minutes:g}",
        "quick": bench.quick,
        "ceilings": asdict(bench.ceilings),
        "rows": [],
        "seconds": {},
        "errors": {},
        "left_out": [],
    }


def _write(found: dict[str, Any], folder: Path) -> None:
    (folder / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "gpu.md").write_text("\n".join(lines(found)) + "\n")


def lines(found: dict[str, Any]) -> list[str]:
    """The section of RESULTS.md: what was found, as Markdown."""
    bandwidth, rate = found["ceilings"]["bandwidth"], found["ceilings"]["rate"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    left = ", ".join(found["left_out"])
    quick = ["A quick run at tiny sizes: the figures mean nothing.", ""] if found["quick"] else []
    return [
        f"## On a GPU: {found['machine']}",
        "",
        *quick,
        f"{found['date']}, `{found['command']}`; {versions}. "
        "Rounds in turns and in rotating order, by the device's own clock, over several sets of "
        "random inputs; medians of the ratios within a round with their quartiles. Floor: the same "
        "without adapters, frozen. Eager: the plain composition. Parts alone: the products of an "
        "adapted layer without autograd. Limit: the floor as measured and what adapters cannot do "
        f"without (`limits.py`), at the measured {bandwidth / 1e12:.2f} TB/s of a copy and "
        f"{rate / 1e12:.0f} TFLOP/s of a bf16 product.",
        "",
        *table([Result(**row) for row in found["rows"]]),
        *(["", f"Left out, as the time was over: {left}."] if left else []),
    ]
