"""How a row is measured and written down: repeated rounds, medians, JSON and Markdown."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
REGISTRY: dict[str, "Row"] = {}


@dataclass(frozen=True)
class Result:
    """One line of the results: what was measured, what it was to be, and whether it is."""

    row: str
    workload: str
    value: str
    goal: str
    met: bool


@dataclass(frozen=True)
class Row:
    """A named measurement; ``measure`` takes the number of rounds."""

    name: str
    measure: Callable[[int], list[Result]]


def row(name: str) -> Callable[[Callable[[int], list[Result]]], Callable[[int], list[Result]]]:
    """Register a measurement under a name."""

    def register(measure: Callable[[int], list[Result]]) -> Callable[[int], list[Result]]:
        REGISTRY[name] = Row(name, measure)
        return measure

    return register


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def median(values: list[float]) -> float:
    """The median of some timings."""
    return statistics.median(values)


def interleaved(actions: list[Callable[[], object]], rounds: int) -> list[float]:
    """The median time of each action; taking turns spreads the machine's moods over all of them."""
    timings: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, timing in zip(actions, timings, strict=True):
            timing.append(seconds(action))
    return [median(timing) for timing in timings]


def machine() -> str:
    """The machine in words, for the head of the results."""
    return (
        f"{os.cpu_count()} {platform.machine()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def write(results: list[Result], command: str) -> None:
    """Write ``results.json`` and ``RESULTS.md`` beside this file."""
    (FOLDER / "results.json").write_text(
        json.dumps({"machine": machine(), "rows": [asdict(r) for r in results]}, indent=2) + "\n"
    )
    lines = [
        "# Results",
        "",
        f"Written by `{command}` on {machine()}. Medians; a goal that is not met says so.",
        "",
        "| row | workload | measured | goal | met |",
        "|---|---|---|---|---|",
        *(
            f"| {r.row} | {r.workload} | {r.value} | {r.goal} | {'yes' if r.met else '**no**'} |"
            for r in results
        ),
    ]
    (FOLDER / "RESULTS.md").write_text("\n".join(lines) + "\n")
