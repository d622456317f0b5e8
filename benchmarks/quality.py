"""Quality on real data: MiniLM learns the VADER words, as in the demo, in our ways and in PEFT's.

``measure`` trains, ``lines`` and ``chart`` show what it found, ``search`` chose the learning rates.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.methods import ADAPT, IN_PEFT, PEFT, optimizer_of, twins
from benchmarks.rates import GRID, RATES
from lora_inject import lora_parameters
from lora_inject.cli import demo

CHART = Path(__file__).parent / "quality.png"
GOAL = 1e-4
CURVE_STEPS = 100
CURVE_RANK, CURVE_ALPHA = 4, 6  # a scaling of 1.5, since one of 1 or 2 would round nothing
EPOCHS = 1
SEEDS = (0, 1, 2)
MEMORY_STEPS = 5
VALIDATION = 1000
SEARCH_SEEDS = (0, 1)
QUICK_STEPS = 10


def measure(quick: bool = False) -> dict[str, Any]:
    """Train with every method and with PEFT, under a progress bar.

    Args:
        quick: a few steps on a few words with one seed, to see that it runs; the figures mean
            nothing then.

    Returns:
        A dict for JSON: ``curves`` (ours and PEFT's, by method), ``methods`` (a list) and
        ``settings``.
    """
    seeds = SEEDS[:1] if quick else SEEDS
    used = slice(QUICK_STEPS * demo.BATCH if quick else None)
    with one_thread(), Progress() as progress:
        curves = {}
        for name in IN_PEFT:
            model, words, _ = start(seed=0)
            steps = QUICK_STEPS if quick else CURVE_STEPS
            curves[name] = compare(model, words, name, steps, progress)
        methods = [_method(name, used, seeds, progress) for name in ADAPT]
    settings = {
        "words": len(words[used]),
        "held_out": demo.HELD_OUT,
        "epochs": EPOCHS,
        "batch": demo.BATCH,
        "seeds": list(seeds),
        "targets": demo.TARGETS,
        "curve_rank": CURVE_RANK,
        "curve_alpha": CURVE_ALPHA,
        "curve_lr": demo.LEARNING_RATE,
        "memory_steps": MEMORY_STEPS,
    }
    return {"curves": curves, "methods": methods, "settings": settings}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: batches this small gain little from more, and lose much to waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start(seed: int) -> tuple[demo.Rater, demo.Words, demo.Words]:
    """The demo's model and words; the seed decides the new head, the adapters and dropout."""
    torch.manual_seed(seed)
    return demo.load()


def compare(
    model: nn.Module, words: demo.Words, method: str, steps: int, progress: Progress
) -> dict[str, Any]:
    """The losses of our adapters and PEFT's, from the same A, B and head, with the same batches.

    Args:
        model: with query and value layers and a head; it gets our adapters, a copy PEFT's.
        words: what it learns.
        method: a name of ``IN_PEFT``.
        steps: how many steps to take.
        progress: where to show them.

    Returns:
        ``ours``, ``peft``, their ``max_difference``, and whether that has ``met`` the ``goal``.
    """
    ours, theirs = twins(model, method, CURVE_RANK, CURVE_ALPHA)
    epochs = 1 + steps // (len(words) // demo.BATCH)
    losses = {}
    for name, twin in (("ours", ours), ("peft", theirs)):
        taken = islice(demo.steps(twin, words, epochs, seed=0), steps)
        losses[name] = list(progress.track(taken, total=steps, description=f"{method} of {name}"))
    difference = max(abs(a - b) for a, b in zip(losses["ours"], losses["peft"], strict=True))
    return {
        "steps": steps,
        "max_difference": difference,
        **losses,
        "goal": GOAL,
        "met": difference <= GOAL,
    }


def _method(name: str, used: slice, seeds: tuple[int, ...], progress: Progress) -> dict[str, Any]:
    """One line of the table: a method trained with every seed."""
    pearsons, seconds, last = [], [], []
    for seed in seeds:
        model, words, held_out = start(seed)
        started = time.perf_counter()
        last += train(name, model, words[used], RATES[name], seed, progress)[-20:]
        seconds.append(time.perf_counter() - started)
        pearsons.append(demo.pearson(demo.predict(model, held_out), held_out.ratings))
    model, words, _ = start(seeds[0])
    training = _steps(name, model, words, RATES[name], seeds[0])
    return {
        "method": name,
        "lr": RATES[name],
        "trainable": sum(p.numel() for p in lora_parameters(model)),
        "pearson": statistics.mean(pearsons),
        "pearsons": pearsons,
        "seconds": statistics.median(seconds),
        "peak_mb": peak(lambda: list(islice(training, MEMORY_STEPS))) / 1e6,
        "final_loss": statistics.mean(last),
    }


def train(
    name: str, model: nn.Module, words: demo.Words, rate: float, seed: int, progress: Progress
) -> list[float]:
    """Adapt a model by a method of ADAPT and train it; returns the loss of every step."""
    steps = _steps(name, model, words, rate, seed)
    total = EPOCHS * (len(words) // demo.BATCH)
    shown = progress.track(steps, total=total, description=f"{name}, {rate:g}, seed {seed}")
    return list(shown)


def _steps(
    name: str, model: nn.Module, words: demo.Words, rate: float, seed: int
) -> Iterator[float]:
    """Adapt a model, and what trains it step by step."""
    adapted = ADAPT[name](model, words)
    return demo.steps(model, words, EPOCHS, seed, rate, optimizer_of(name, adapted, rate))


def peak(action: Callable[[], object]) -> int:
    """The bytes that torch's CPU allocator holds at most during a call, beyond those before it.

    Every tensor counts: saved activations, gradients, optimizer states and what lives for the
    length of an operation. It is exact and the same in every run, unlike the memory of a process.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    # The changes and not the totals, which go on from one profiler to the next.
    changes = sorted(
        (e["ts"], i, e["args"]["Bytes"])
        for i, e in enumerate(events)
        if e.get("name") == "[memory]"
    )
    return max(accumulate((n_bytes for *_, n_bytes in changes), initial=0))


def search() -> dict[str, dict[float, float]]:
    """How ``rates.py`` came about: for each method what every rate reaches on validation words.

    The validation words are the last of the training words; no held-out word is looked at. Two
    seeds, since the largest rates learn with one and diverge with another. It takes longer than
    ``measure`` and is run by hand when the task changes.

    Returns:
        The mean Pearson correlation on the validation words, by method and rate.
    """
    with one_thread(), Progress() as progress:
        return {
            name: {rate: _validate(name, rate, progress) for rate in rates}
            for name, rates in GRID.items()
        }


def _validate(name: str, rate: float, progress: Progress) -> float:
    """The mean Pearson correlation that a learning rate reaches on validation words."""
    pearsons = []
    for seed in SEARCH_SEEDS:
        model, words, _ = start(seed)
        training, validation = words[:-VALIDATION], words[-VALIDATION:]
        train(name, model, training, rate, seed, progress)
        pearsons.append(demo.pearson(demo.predict(model, validation), validation.ratings))
    return statistics.mean(pearsons)


def lines(found: dict[str, Any]) -> list[str]:
    """The section of RESULTS.md.

    Args:
        found: what ``measure`` returned.

    Returns:
        Lines of Markdown, heading first.
    """
    curves, settings = found["curves"], found["settings"]
    seeds, one = len(settings["seeds"]), next(iter(curves.values()))
    apart = ", ".join(f"{name} {own['max_difference']:.1e}" for name, own in curves.items())
    wrong = [name for name, own in curves.items() if not own["met"]]
    coincide = f"**do not coincide** in {', '.join(wrong)}" if wrong else "coincide"
    return [
        "## Quality: MiniLM on the VADER words",
        "",
        "| method | trainable parameters | learning rate "
        f"| held-out Pearson, mean of {seeds} seeds (range) "
        "| training loss at the end | seconds | peak memory beyond the model |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {m['method']} | {m['trainable']:,} | {m['lr']:g} | {m['pearson']:.3f} "
            f"({min(m['pearsons']):.3f} to {max(m['pearsons']):.3f}) | {m['final_loss']:.2f} "
            f"| {m['seconds']:.1f} | {m['peak_mb']:.1f} MB |"
            for m in found["methods"]
        ),
        "",
        f"Ours and PEFT {coincide}: from the same A, B and head, with the same batches, the losses "
        f"of {one['steps']} steps differ by at most: {apart} "
        f"(goal <= {one['goal']:.0e}; r={settings['curve_rank']}, "
        f"alpha={settings['curve_alpha']}, learning rate {settings['curve_lr']:g}, float32, no "
        "dropout).",
        "",
        f"How: {settings['epochs']} pass over {settings['words']:,} words in batches of "
        f"{settings['batch']} with AdamW and a one-cycle schedule, tested on "
        f"{settings['held_out']:,} other words; LoRA on {' and '.join(settings['targets'])}, alpha "
        "= r; the head trains in every method. The learning rate of each is the best of a grid on "
        f"{VALIDATION:,} of the training words (`search` in `quality.py`). Seconds are the median "
        "over the seeds, on one core. Peak memory is the most that torch's allocator held beyond "
        f"the model in the first {settings['memory_steps']} steps, by torch's profiler: "
        "activations, gradients, optimizer states and temporary tensors, counted exactly.",
        "",
        "![Left the losses of ours and PEFT, right what each method reaches](quality.png)",
    ]


def chart(found: dict[str, Any], path: Path) -> None:
    """Draw a PNG: the two loss curves, and held-out Pearson over trainable parameters.

    Args:
        found: what ``measure`` returned.
        path: where to write it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves, methods = found["curves"]["LoRA"], found["methods"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(curves["ours"], color="tab:blue", linewidth=2.5, label="lora_inject")
    left.plot(curves["peft"], color="black", linewidth=1, linestyle="--", label="PEFT")
    left.set(
        xlabel="step",
        ylabel="mean squared error",
        title=f"Training loss; the curves differ by at most {curves['max_difference']:.1e}",
    )
    left.legend()
    for m in methods:
        x, y, is_peft = m["trainable"], m["pearson"], m["method"].endswith(PEFT)
        spread = [[y - min(m["pearsons"])], [max(m["pearsons"]) - y]]
        right.errorbar(x, y, yerr=spread, fmt="x" if is_peft else "o", capsize=3,
                       color="black" if is_peft else "tab:blue")  # fmt: skip
        if not is_peft:  # which stands beside ours
            right.annotate(m["method"], (x, y), xytext=(8, -3), textcoords="offset points",
                           rotation=-40, rotation_mode="anchor", va="top")  # fmt: skip
    right.set_xscale("log")
    right.margins(x=0.3, y=0.3)
    right.grid(alpha=0.3)
    right.set(
        xlabel="trainable parameters",
        ylabel="Pearson correlation",
        title="Held-out words: mean and range over seeds (x: PEFT)",
    )
    figure.savefig(path, dpi=120)
