"""The parts of a report, and how they look as tables."""

from typing import NamedTuple

from lora_inject.printing import Section, count, size
from lora_inject.report.bytes import Bytes


class PatternRow(NamedTuple):
    """What one target pattern adapted.

    Attributes:
        pattern: as the user wrote it.
        adapter: the adapter's name.
        layers: how many layers it chose.
        ranks: the ranks there, ascending.
        parameters: elements of A and B.
        weight: that with which the adapter is in use; None for one that is not.
    """

    pattern: str
    adapter: str
    layers: int
    ranks: tuple[int, ...]
    parameters: int
    weight: float | None = 1.0

    @property
    def rank_text(self) -> str:
        """The ranks for a table."""
        return ", ".join(map(str, self.ranks))

    @property
    def use_text(self) -> str:
        """Whether it is in use, for a table."""
        return "no" if self.weight is None else "yes" if self.weight == 1 else f"{self.weight:g}"


class Memory(NamedTuple):
    """Bytes that training needs, beside those of training the whole model; activations left out.

    Attributes:
        optimizer: the optimizer it is for.
        trainable: weights, gradients and optimizer state of what trains.
        frozen: weights of what stands still.
        full: weights, gradients and optimizer state if every parameter of the base model trained.
    """

    optimizer: str
    trainable: Bytes
    frozen: Bytes
    full: Bytes

    @property
    def ratio(self) -> float:
        """How many times less the trainable part needs than full fine-tuning does."""
        return self.full.total / self.trainable.total if self.trainable.total else float("inf")

    @property
    def ratio_with_frozen(self) -> float:
        """The same with the frozen weights, which have to be held too."""
        held = self.trainable.total + self.frozen.total
        return self.full.total / held if held else float("inf")


def patterns_section(patterns: tuple[PatternRow, ...]) -> Section:
    """What each pattern adapted, and what of it is in use where that is not all."""
    rows = [
        (p.pattern, p.adapter, count(p.layers), p.rank_text, count(p.parameters), p.use_text)
        for p in patterns
    ]
    columns = ("~chosen by", "?adapter", ">layers", ">r", ">parameters", "in use")
    shown = len(columns) if any(p.weight != 1 for p in patterns) else len(columns) - 1
    return Section("Adapted layers", columns[:shown], [row[:shown] for row in rows])


def _times(ratio: float) -> str:
    """How much less, or more where layers are smaller than their adapters."""
    times, word = (ratio, "less") if ratio >= 1 else (1 / ratio, "more")
    return f"{times:,.0f} times {word}" if times >= 10 else f"{times:.1f} times {word}"


def memory_section(memory: Memory) -> Section:
    """The bytes of weights, gradients and optimizer state, side by side."""
    rows = [
        (part, *(_by_dtype(getattr(held, part)) for held in _columns(memory)))
        for part in ("weights", "gradients", "optimizer")
    ]
    rows.append(("total", *(size(held.total) for held in _columns(memory))))
    ratios = "Training state: none"
    if memory.trainable.total:
        ratios = f"Training state: {_times(memory.ratio)} than full fine-tuning"
    return Section(
        f"Memory with {memory.optimizer}, activations left out",
        ("", ">trainable", ">frozen", "?>full fine-tuning"),
        rows,
        notes=[f"{ratios}; with the frozen weights, {memory.ratio_with_frozen:.1f} times."],
    )


def _columns(memory: Memory) -> tuple[Bytes, Bytes, Bytes]:
    return memory.trainable, memory.frozen, memory.full


def _by_dtype(parts: dict[str, int]) -> str:
    return " + ".join(f"{size(n)} {dtype}" for dtype, n in parts.items() if n) or "-"
