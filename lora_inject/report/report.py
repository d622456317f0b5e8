"""What trains, counted from the live model: parameters, and the bytes that training them needs."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import dtype, nn
from torch.nn.parameter import is_lazy

from lora_inject.changes.statistics import is_held
from lora_inject.core.drift import drift, sentences
from lora_inject.core.look import Look
from lora_inject.core.roles import ADAPTER_ROLES, ROLES, roles
from lora_inject.kinds.bias import is_bias
from lora_inject.own import own_tensor
from lora_inject.printing import STILL, TRAINS, Section, Shown, Tables, count, few, plural
from lora_inject.report.bytes import (
    can_train,
    frozen_bytes,
    logical_numel,
    optimizer_states,
    stored_tensors,
    trainable_dtype,
    training_bytes,
)
from lora_inject.report.new_parts import new_and_frozen
from lora_inject.report.report_tables import Memory, PatternRow, memory_section, patterns_section
from lora_inject.sharding import whole_numel

_OF_VARIANTS = frozenset(ADAPTER_ROLES) - {"lora_A", "lora_B"}


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """Trainable parameters and training memory of a model; ``print`` shows it as a table.

    Every Parameter is counted once, however many names it has.

    Attributes:
        model: the model's class name.
        trainable: elements of parameters that train.
        frozen: elements of parameters that do not.
        split: elements that train by part: lora_A, lora_B, bias, train_also, other, and what other
            variants of LoRA have where there are such.
        patterns: what each target pattern adapted.
        bias: the bias mode, or None where nothing was injected.
        memory: bytes for the optimizer asked about.
        notes: remarks for the reader.
        alerts: remarks that stand first, since what trains will hardly be what was meant.
    """

    model: str
    trainable: int
    frozen: int
    split: dict[str, int]
    patterns: tuple[PatternRow, ...]
    bias: str | None
    memory: Memory
    notes: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Elements of all parameters, adapters included."""
        return self.trainable + self.frozen

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all; 0 for a model without parameters."""
        return 100 * self.trainable / self.total if self.total else 0.0

    @property
    def line(self) -> str:
        """All of it in one line, for logs."""
        return (
            f"{self.model}: {count(self.trainable)} of {count(self.total)} parameters train "
            f"({self.percent:.4f} %)"
        )

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
            "patterns": [{**row._asdict(), "ranks": list(row.ranks)} for row in self.patterns],
            "memory": {
                "optimizer": m.optimizer,
                "trainable": m.trainable.to_dict(),
                "frozen": m.frozen.to_dict(),
                "full": m.full.to_dict(),
                "ratio": m.ratio,
                "ratio_with_frozen": m.ratio_with_frozen,
            },
            "notes": list(self.notes),
            "alerts": list(self.alerts),
        }

    def _tables(self) -> Tables:
        parts = [(name, count(n)) for name, n in self.split.items() if n]
        trains = Section(
            "\n".join((self.line, *self.alerts)),
            ("trains", ">parameters"),
            [*parts, ("frozen", count(self.frozen))],
            styles=[*[TRAINS] * len(parts), STILL],
        )
        chosen = patterns_section(self.patterns)
        memory = memory_section(self.memory)
        sections = [trains, *([chosen] if self.patterns else []), memory]
        if self.notes:
            sections.append(Section("Notes", (), (), notes=self.notes))
        return Tables(sections)


def report(model: nn.Module, optimizer: str = "adamw") -> Report:
    """Count what trains in a model, injected or not, and what memory that takes.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject(model, nn.Linear, r=2)
        >>> report(model).trainable, report(model, optimizer="sgd").memory.trainable.total
        (32, 256)
        >>> report(model).line
        'Sequential: 32 of 104 parameters train (30.7692 %)'

    Args:
        model: any ``nn.Module``; it may be on the meta device.
        optimizer: what the memory is for: "adamw", "adam", "sgd", "sgd-momentum", "rmsprop", ...

    Returns:
        The numbers; ``str`` makes them readable, ``to_dict`` ready for JSON.

    Raises:
        ArgumentError: the optimizer is not known.
    """
    return report_of(Look(model), optimizer)


def report_of(look: Look, optimizer: str = "adamw") -> Report:
    """``report`` for a model that has been looked at."""
    states = optimizer_states(optimizer)
    waiting = {id(own_tensor(module, name)) for module, _, name in look.waiting()}
    split, still = dict.fromkeys(ROLES, 0), 0  # elements that train, and that do not
    trains, stands, base = Counter[dtype](), Counter[dtype](), Counter[dtype]()
    for parameter, role in roles(look).items():
        n = logical_numel(parameter)
        if parameter.requires_grad:
            split[role] += n
            trains[trainable_dtype(parameter)] += n
        else:
            still += n
            for tensor in stored_tensors(parameter):
                stands[tensor.dtype] += whole_numel(tensor) * tensor.dtype.itemsize
        if role not in ADAPTER_ROLES and can_train(parameter) and id(parameter) not in waiting:
            base[trainable_dtype(parameter)] += n
    return Report(
        model=type(look.model).__name__,
        trainable=sum(split.values()),
        frozen=still,
        split={role: n for role, n in split.items() if n or role not in _OF_VARIANTS},
        patterns=_pattern_rows(look),
        bias=" + ".join(dict.fromkeys(look.known.values())) or None,
        memory=Memory(
            optimizer,
            trainable=training_bytes(trains, states),
            frozen=frozen_bytes(stands),
            full=training_bytes(base, states),
        ),
        notes=_notes(look, bool(trains)),
        alerts=new_and_frozen(look),
    )


def _pattern_rows(look: Look) -> tuple[PatternRow, ...]:
    groups: dict[tuple[str, str, float | None], list[tuple[int, int]]] = {}
    for layer, adapter in look.adapters:
        if adapter.follows:
            continue  # it has no parameters of its own
        weight = look.states[layer].use.weights.get(adapter.name)  # parts of a model may differ
        found = groups.setdefault((adapter.pattern, adapter.name, weight), [])
        variant = adapter.settings.variant
        found.append((adapter.settings.r, sum([variant.elements(spec) for spec in adapter.specs])))
    return tuple(
        PatternRow(
            pattern=pattern,
            adapter=name,
            layers=len(found),
            ranks=tuple(sorted({r for r, _ in found})),
            parameters=sum(n for _, n in found),
            weight=weight,
        )
        for (pattern, name, weight), found in groups.items()
    )


def _notes(look: Look, trains: bool) -> tuple[str, ...]:
    notes = [] if trains else ["No parameter trains."]
    lazy = sum(map(is_lazy, look.parameters))
    if lazy:
        notes.append(f"{plural(lazy, 'parameter')} of lazy layers have no shape yet: not counted.")
    added = sum(each.trains for each in drift(look, "came"))
    if added:
        notes.append(
            f"{plural(added, 'parameter')} that came into the model since inject train too, until "
            "the next inject or freeze."
        )
    silent = _without_gradient(look)
    if silent:
        notes.append(
            f"{few(silent)}: no gradient reached its adapter in the last backward "
            "pass, as it did others. Where its forward is never called, exclude it; "
            "DistributedDataParallel fails on it, unless with find_unused_parameters=True."
        )
    notes += sentences(drift(look, "gone", "thawed", "frozen", "class", "forward"))
    trains_biases = any(bias != "none" for bias in look.known.values())
    still = sum(
        not flag and is_bias(module, name)
        for module, state in (look.states.items() if trains_biases else ())
        for name, flag in state.before.flags
        if (parameter := own_tensor(module, name)) is not None and not parameter.requires_grad
    )
    if still:
        notes.append(f"{plural(still, 'bias parameter')} had been frozen before and stay so.")
    held = [module for module in look.index.modules if is_held(module)]
    if held:
        notes.append(
            f"The running statistics of {plural(len(held), 'normalisation layer')} stand still; in "
            "training mode they normalise by the batch, as before."
        )
    return tuple(notes)


def _without_gradient(look: Look) -> list[str]:
    """The layers whose adapters run, train and have no gradient, where others have one."""
    if all(parameter.grad is None for parameter in look.parameters):
        return []
    has: dict[str, bool] = {}
    for path, layer in look.layers.items():
        state = look.states[layer]
        own = [layer._parameters.get(n) for t in state.running for n in t.names.values()]
        trains = [p for p in own if p is not None and p.requires_grad]
        if trains:
            has[path] = any(p.grad is not None for p in trains)
    return [path for path, reached in has.items() if not reached] if any(has.values()) else []
