"""How a row is measured and written down: rounds in turns, medians of ratios, tables, a chart."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
DATA, TABLES, CHART = FOLDER / "results.json", FOLDER / "RESULTS.md", FOLDER / "results.png"
Lines = Callable[[dict[str, Any]], list[str]]  # the Markdown of a section
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
    """

    row: str
    workload: str
    value: str
    goal: str
    met: bool | None
    times: dict[str, float] = field(default_factory=dict)
    profile: str = ""


@dataclass(frozen=True)
class Row:
    """A named measurement; ``measure`` takes the number of rounds."""

    name: str
    device: str
    measure: Callable[[int], list[Result]]


def row(
    name: str, device: str = "cpu"
) -> Callable[[Callable[[int], list[Result]]], Callable[[int], list[Result]]]:
    """Register a measurement under a name, for a device."""

    def register(measure: Callable[[int], list[Result]]) -> Callable[[int], list[Result]]:
        REGISTRY[name] = Row(name, device, measure)
        return measure

    return register


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    _finish()
    started = time.perf_counter()
    action()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():  # a GPU works on while the call has returned
        torch.cuda.synchronize()


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

    def over(self, floor: str) -> dict[str, float]:
        """Every other action's time as a multiple of the floor's."""
        return {name: self.ratio(name, floor) for name in self.rounds if name != floor}


def interleaved(
    actions: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1
) -> Timings:
    """Time some actions in turns, which spreads the machine's moods over all of them.

    Args:
        actions: what to time.
        rounds: how often; one more goes before, for caches, and is not counted.
        repeats: how often an action is called within a round, for short ones.
    """

    def repeated(action: Callable[[], object]) -> Callable[[], object]:
        return lambda: [action() for _ in range(repeats)]

    taken: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    for i in range(rounds + 1):
        shift = i % len(names)  # each follows each other one equally often
        for name in names[shift:] + names[:shift]:
            timing = seconds(repeated(actions[name])) / repeats
            if i:
                taken[name].append(timing)
    return Timings(taken)


def compared(timings: Timings, floor: str = "floor") -> str:
    """What a row says of ours and the peers, as multiples of the floor."""
    others = timings.over(floor)
    peers = ", ".join(f"{name} {value:.2f}x" for name, value in others.items() if name != "ours")
    return f"{others['ours']:.2f}x floor ({peers})"


def machine() -> str:
    """The machine in words, for the head of the results."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def as_section(results: list[Result]) -> dict[str, Any]:
    """A section of the data file: where it was measured, and the lines."""
    return {"machine": machine(), "rows": [asdict(r) for r in results]}


def write(
    section: str, found: dict[str, Any], lines: Callable[[dict[str, Any]], list[str]]
) -> None:
    """Put a section into ``results.json``, and write ``RESULTS.md`` and the chart anew.

    Args:
        section: the name of the section; the others stay as they are.
        found: the section's data.
        lines: makes the Markdown of the section "quality", which has a shape of its own.
    """
    data = json.loads(DATA.read_text()) if DATA.exists() else {}
    data[section] = found
    DATA.write_text(json.dumps(data, indent=2) + "\n")
    text = ["# Results", "", *_speed_lines(data)]
    if "quality" in data:
        text += ["", *lines(data["quality"])]
    TABLES.write_text("\n".join(text) + "\n")
    draw_chart(
        [Result(**r) for name in ("cpu", "cuda") for r in data.get(name, {}).get("rows", [])]
    )


def _speed_lines(data: dict[str, Any]) -> list[str]:
    text: list[str] = []
    for name, command in (("cpu", ""), ("cuda", " --device cuda")):
        if name in data:
            text += [
                f"## Speed and memory, on {data[name]['machine']}",
                "",
                f"Written by `python -m benchmarks{command}`: rounds in turns with the peers and "
                "the floor, which is the frozen model without adapters; medians of the ratios "
                "within a round.",
                "",
                *table([Result(**r) for r in data[name]["rows"]]),
                "",
            ]
    return [*text, f"![times as multiples of the floor]({CHART.name})"]


def table(results: list[Result]) -> list[str]:
    """The lines as a Markdown table, and what is said of goals that are not met."""
    words = {True: "yes", False: "**no**", None: "not run"}
    notes = [r for r in results if r.profile and not r.met]
    return [
        "| row | workload | measured | goal | met |",
        "|---|---|---|---|---|",
        *(f"| {r.row} | {r.workload} | {r.value} | {r.goal} | {words[r.met]} |" for r in results),
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
