"""What trains, counted from the live model: parameters, and the bytes that training them needs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lora_inject.layer import adapters_of
from lora_inject.memory import (
    Bytes,
    can_train,
    frozen_bytes,
    logical_numel,
    optimizer_states,
    training_bytes,
)
from lora_inject.record import Record, adapted_layers, former_flags, own_tensor, records_in
from lora_inject.roles import ADAPTER_ROLES, ROLES, is_bias, roles
from lora_inject.statistics import is_held
from lora_inject.tables import Section, Tables, count, plural, size


@dataclass(frozen=True)
class PatternRow:
    """What one target pattern adapted.

    Attributes:
        pattern: as the user wrote it.
        adapter: the adapter's name.
        layers: how many layers it chose.
        ranks: the ranks there, ascending.
        parameters: elements of A and B.
    """

    pattern: str
    adapter: str
    layers: int
    ranks: tuple[int, ...]
    parameters: int

    @property
    def rank_text(self) -> str:
        """The ranks for a table."""
        return ", ".join(map(str, self.ranks))


@dataclass(frozen=True)
class Memory:
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


@dataclass(frozen=True)
class Report:
    """Trainable parameters and training memory of a model; ``print`` shows it as a table.

    Every Parameter is counted once, however many names it has.

    Attributes:
        model: the model's class name.
        trainable: elements of parameters that train.
        frozen: elements of parameters that do not.
        split: elements that train by part: lora_A, lora_B, bias, train_also, other.
        patterns: what each target pattern adapted.
        bias: the bias mode, or None where nothing was injected.
        memory: bytes for the optimizer asked about.
        notes: remarks for the reader.
    """

    model: str
    trainable: int
    frozen: int
    split: dict[str, int]
    patterns: tuple[PatternRow, ...]
    bias: str | None
    memory: Memory
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Elements of all parameters, adapters included."""
        return self.trainable + self.frozen

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all; 0 for a model without parameters."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON."""
        m = self.memory
        return {
            "model": self.model,
            "trainable": self.trainable,
            "frozen": self.frozen,
            "total": self.total,
            "percent": self.percent,
            "bias": self.bias,
            "split": dict(self.split),
            "patterns": [{**asdict(row), "ranks": list(row.ranks)} for row in self.patterns],
            "memory": {
                "optimizer": m.optimizer,
                "trainable": m.trainable.to_dict(),
                "frozen": m.frozen.to_dict(),
                "full": m.full.to_dict(),
                "ratio": m.ratio,
                "ratio_with_frozen": m.ratio_with_frozen,
            },
            "notes": list(self.notes),
        }

    def _tables(self) -> Tables:
        headline = (
            f"{self.model}: {count(self.trainable)} of {count(self.total)} parameters train "
            f"({self.percent:.4f} %)"
        )
        parts = [(name, count(n)) for name, n in self.split.items() if n]
        trains = Section(
            headline, ("trains", ">parameters"), [*parts, ("frozen", count(self.frozen))]
        )
        chosen = Section(
            "Adapted layers",
            ("chosen by", "adapter", ">layers", ">r", ">parameters"),
            [
                (p.pattern, p.adapter, count(p.layers), p.rank_text, count(p.parameters))
                for p in self.patterns
            ],
        )
        memory = _memory_section(self.memory)
        sections = [trains, *([chosen] if self.patterns else []), memory]
        if self.notes:
            sections.append(Section("Notes", ("",), [(note,) for note in self.notes]))
        return Tables(sections)

    def __str__(self) -> str:
        return self._tables().text()

    def _repr_html_(self) -> str:
        return self._tables().html()


def report(model: nn.Module, optimizer: str = "adamw") -> Report:
    """Count what trains in a model, injected or not, and what memory that takes.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject(model, nn.Linear, r=2)
        >>> report(model).trainable, report(model, optimizer="sgd").memory.trainable.total
        (32, 256)

    Args:
        model: any ``nn.Module``; it may be on the meta device.
        optimizer: what the memory is for: "adamw", "adam", "sgd", "sgd-momentum", "rmsprop", ...

    Returns:
        The numbers; ``str`` makes them readable, ``to_dict`` ready for JSON.

    Raises:
        ArgumentError: the optimizer is not known.
    """
    states = optimizer_states(optimizer)
    role_of = roles(model)
    trainable = [p for p in role_of if p.requires_grad]
    frozen = [p for p in role_of if not p.requires_grad]
    base = [p for p, role in role_of.items() if role not in ADAPTER_ROLES and can_train(p)]
    records = [record for _, _, record in records_in(model)]
    return Report(
        model=type(model).__name__,
        trainable=_elements(trainable),
        frozen=_elements(frozen),
        split={role: _elements(p for p in trainable if role_of[p] == role) for role in ROLES},
        patterns=_pattern_rows(adapted_layers(model).values()),
        bias=records[0].bias if records else None,
        memory=Memory(
            optimizer,
            trainable=training_bytes(trainable, states),
            frozen=frozen_bytes(frozen),
            full=training_bytes(base, states),
        ),
        notes=_notes(model, trainable, records),
    )


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(map(logical_numel, parameters))


def _pattern_rows(layers: Iterable[nn.Module]) -> tuple[PatternRow, ...]:
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for layer in layers:
        for adapter in adapters_of(layer):
            if adapter.follows:
                continue  # it has no parameters of its own
            found = groups.setdefault((adapter.pattern, adapter.name), [])
            found.append((adapter.settings.r, sum(spec.elements for spec in adapter.specs)))
    return tuple(
        PatternRow(
            pattern=pattern,
            adapter=name,
            layers=len(found),
            ranks=tuple(sorted({r for r, _ in found})),
            parameters=sum(n for _, n in found),
        )
        for (pattern, name), found in groups.items()
    )


def _notes(
    model: nn.Module, trainable: list[nn.Parameter], records: list[Record]
) -> tuple[str, ...]:
    notes = [] if trainable else ["No parameter trains."]
    former = former_flags(model) if any(record.bias != "none" for record in records) else {}
    still = sum(
        not flag and is_bias(module, name)
        for module, flags in former.items()
        for name, flag in flags.items()
        if (parameter := own_tensor(module, name)) is not None and not parameter.requires_grad
    )
    if still:
        notes.append(f"{plural(still, 'bias parameter')} had been frozen before and stay so.")
    held = [m for m in model.modules() if is_held(m)]
    if held:
        notes.append(
            f"The running statistics of {plural(len(held), 'normalisation layer')} stand still; in "
            "training mode they normalise by the batch, as before."
        )
    return tuple(notes)


def _memory_section(memory: Memory) -> Section:
    rows = [
        (part, *(_by_dtype(getattr(held, part)) for held in _columns(memory)))
        for part in ("weights", "gradients", "optimizer")
    ]
    rows.append(("total", *(size(held.total) for held in _columns(memory))))
    ratios = (
        f"Training state: {memory.ratio:,.0f} times less than full fine-tuning"
        if memory.trainable.total
        else "Training state: none"
    )
    return Section(
        f"Memory with {memory.optimizer}, activations left out",
        ("", ">trainable", ">frozen", ">full fine-tuning"),
        rows,
        notes=[f"{ratios}; with the frozen weights, {memory.ratio_with_frozen:.1f} times."],
    )


def _columns(memory: Memory) -> tuple[Bytes, Bytes, Bytes]:
    return memory.trainable, memory.frozen, memory.full


def _by_dtype(parts: dict[str, int]) -> str:
    return " + ".join(f"{size(n)} {dtype}" for dtype, n in parts.items() if n) or "-"
