"""How a row is measured and written down: rounds in turns, medians of ratios, tables, a chart."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
DATA, TABLES, CHART = FOLDER / "results.json", FOLDER / "RESULTS.md", FOLDER / "results.png"
Lines = Callable[[dict[str, Any]], list[str]]  # the Markdown of a section
Action = Callable[[], object]
Clock = Callable[[Action], float]  # how many seconds an action takes
FEWEST_ROUNDS = 3
# Actions that are no peers, and no bars of the chart: the least that is possible, and the frozen
# layer's products alone.
LIMIT, PRODUCTS = "limit", "products"
REGISTRY: dict[str, "Row"] = {}


@dataclass(frozen=True)
class Result:
    """One line of the results: what was measured, what it was to be, and whether it is.

    Attributes:
        row: the name of the row.
        workload: what is done.
        value: what was measured, in words.
        goal: what it was to be.
        met: whether it is; None for what this machine cannot run.
        times: how long it took, as multiples of the floor, for the chart.
        profile: where the time goes, for a goal that is not met.
        limit: the least that is possible on this machine, in words.
    """

    row: str
    workload: str
    value: str
    goal: str
    met: bool | None
    times: dict[str, float] = field(default_factory=dict)
    profile: str = ""
    limit: str = ""


@dataclass(frozen=True)
class Row:
    """A named measurement on the CPU; ``measure`` takes the number of rounds."""

    name: str
    measure: Callable[[int], list[Result]]


def row(
    name: str,
) -> Callable[[Callable[[int], list[Result]]], Callable[[int], list[Result]]]:
    """Register a measurement under a name."""

    def register(measure: Callable[[int], list[Result]]) -> Callable[[int], list[Result]]:
        REGISTRY[name] = Row(name, measure)
        return measure

    return register


def seconds(action: Action) -> float:
    """How long a call takes, by the computer's clock."""
    _finish()
    started = time.perf_counter()
    action()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():  # a GPU works on while the call has returned
        torch.cuda.synchronize()


def event_seconds(action: Action) -> float:
    """How long what a call starts keeps the GPU busy, by its own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Timings:
    """How long each of some actions took in each round."""

    def __init__(self, rounds: dict[str, list[float]]) -> None:
        self.rounds = rounds

    def seconds(self, name: str) -> float:
        """The median time of an action."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, to: str) -> float:
        """The median over the rounds of one action's time as a multiple of another's."""
        pairs = zip(self.rounds[name], self.rounds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def spread(self, name: str, to: str) -> tuple[float, float]:
        """The quartiles of the same ratios."""
        ratios = [a / b for a, b in zip(self.rounds[name], self.rounds[to], strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    def over(self, floor: str) -> dict[str, float]:
        """Our time and the peers' as multiples of the floor's."""
        rest = [name for name in self.rounds if name not in (floor, LIMIT, PRODUCTS)]
        return {name: self.ratio(name, floor) for name in rest}


def interleaved(
    actions: Mapping[str, Action],
    rounds: int,
    repeats: int = 1,
    *,
    clock: Clock = seconds,
    within: float = math.inf,
    around: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> Timings:
    """Time some actions in turns, which spreads the machine's moods over all of them.

    Args:
        actions: what to time.
        rounds: how often; one more goes before, for caches, and is not counted.
        repeats: how often an action is called within a round, for short ones.
        clock: what measures: ``seconds``, or ``event_seconds`` on a GPU.
        within: no round starts after this many seconds, but for the first three.
        around: for some actions, a context in which they run and which is not timed.
    """

    def repeated(action: Action) -> Action:
        return lambda: [action() for _ in range(repeats)]

    taken: dict[str, list[float]] = {name: [] for name in actions}
    names, started = list(actions), time.perf_counter()
    for i in range(rounds + 1):
        if i > FEWEST_ROUNDS and time.perf_counter() - started > within:
            break
        shift = i % len(names)  # each follows each other one equally often
        for name in names[shift:] + names[:shift]:
            with (around or {}).get(name, nullcontext)():
                timing = clock(repeated(actions[name])) / repeats
            if i:
                taken[name].append(timing)
    return Timings(taken)


def compared(timings: Timings, floor: str = "floor") -> str:
    """What a row says of ours and the peers, as multiples of the floor."""
    others = timings.over(floor)
    peers = ", ".join(f"{name} {value:.2f}x" for name, value in others.items() if name != "ours")
    return f"{others['ours']:.2f}x floor ({peers})"


def limit_of(timings: Timings, floor: str = "floor") -> str:
    """The least possible, which was timed among the others, for its column."""
    return f"{timings.ratio(LIMIT, floor):.2f}x {floor}"


def machine() -> str:
    """The machine in words, for the head of the results."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{os.cpu_count()} {platform.machine()} cores "
        f"({torch.backends.cpu.get_cpu_capability()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def as_section(results: list[Result]) -> dict[str, Any]:
    """A section of the data file: where it was measured, and the lines."""
    return {"machine": machine(), "rows": [asdict(r) for r in results]}


def write(section: str, found: dict[str, Any], others: Mapping[str, Lines]) -> None:
    """Put a section into ``results.json``, and write ``RESULTS.md`` and the chart anew.

    Args:
        section: the name of the section; the others stay as they are.
        found: the section's data.
        others: for each section but "cpu", in their order, what makes its Markdown.
    """
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    data[section] = found
    DATA.write_text(json.dumps(data, indent=2) + "\n")
    sections = [
        _speed_lines(data),
        *(lines(data[name]) for name, lines in others.items() if name in data),
    ]
    text = "\n\n".join("\n".join(lines) for lines in [["# Results"], *sections] if lines)
    TABLES.write_text(text + "\n")
    draw_chart([Result(**r) for r in data.get("cpu", {}).get("rows", [])])


def _speed_lines(data: dict[str, Any]) -> list[str]:
    if "cpu" not in data:
        return []
    return [
        f"## Speed and memory, on {data['cpu']['machine']}",
        "",
        "Written by `python -m benchmarks`: rounds in turns with the peers and the floor, which is "
        "the frozen model without adapters; medians of the ratios within a round.",
        "",
        *table([Result(**r) for r in data["cpu"]["rows"]]),
        "",
        f"![times as multiples of the floor]({CHART.name})",
    ]


def table(results: list[Result]) -> list[str]:
    """The lines as a Markdown table, and what is said of goals that are not met."""
    words = {True: "yes", False: "**no**", None: "not run"}
    notes = [r for r in results if r.profile and not r.met]
    return [
        "| row | workload | measured | goal | met | limit |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r.row} | {r.workload} | {r.value} | {r.goal} | {words[r.met]} | {r.limit} |"
            for r in results
        ),
        *(["", "Where the time goes in what is not met:", ""] if notes else []),
        *(f"- {r.row}, {r.workload}: {r.profile}" for r in notes),
    ]


def draw_chart(results: list[Result]) -> None:
    """Draw the times of ours and the peers beside the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if r.times][::-1]
    names = list(dict.fromkeys(name for r in shown[::-1] for name in r.times))
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.6 * len(shown)), layout="constrained")
    height = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        found = [(j, r.times[name]) for j, r in enumerate(shown) if name in r.times]
        places = [j + 0.4 - height * (i + 0.5) for j, _ in found]
        bars = axes.barh(places, [value for _, value in found], height, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=1, label="floor: the frozen layer or model")
    axes.set_yticks(range(len(shown)), [r.workload for r in shown], fontsize=8)
    axes.set_xlabel("time as a multiple of the floor (less is better)")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(CHART, dpi=110)
    pyplot.close(figure)
