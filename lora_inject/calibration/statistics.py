"""What ``calibrate`` returns: moments of inputs and gradients of weights, as a value.

It can be printed, saved, loaded, and added up across ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lora_inject.arithmetic.moments import Moments
from lora_inject.printing import Section, Shown, Tables, count, few, plural, size

Paths = tuple[str, ...]


class Layer(NamedTuple):
    """A layer that was watched.

    Attributes:
        pattern: a target pattern that selects it alone.
        elements: how many parameters an adapter has for each unit of its rank.
        most: the largest rank whose update has so many directions and whose adapter is not larger
            than the weight.
    """

    pattern: str
    elements: int
    most: int


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(Shown):
    """What was seen of a model's layers; ``print`` shows it as a table.

    Attributes:
        layers: the layers by path, in registration order.
        inputs: moments of what they read, by the paths of the layers that read the same.
        gradients: the sums of the gradients of their weights, as matrices (..., out, in), by path.
        batches: how many batches there were.
    """

    layers: Mapping[str, Layer]
    inputs: Mapping[Paths, Moments]
    gradients: Mapping[str, Tensor] = field(repr=False)
    batches: int

    def inputs_of(self, path: str) -> Moments | None:
        """The moments of what a layer read; None of one that was not watched."""
        return self._moments.get(path)

    def gradient_of(self, path: str) -> Tensor | None:
        """The mean gradient of a layer's weight as a matrix; None where it is not known."""
        found = self.gradients.get(path)
        return None if found is None else found / max(1, self.batches)

    @property
    def groups(self) -> list[Paths]:
        """The layers, together where they read the same."""
        found: dict[Moments, list[str]] = {}
        for path, moments in self._moments.items():
            found.setdefault(moments, []).append(path)
        return [tuple(paths) for paths in found.values()]

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        """The moments of each layer; those of layers that always read the same are one object."""
        keys: dict[str, tuple[Paths, ...]] = dict.fromkeys(self.layers, ())
        for key in self.inputs:
            for path in key:
                keys[path] = (*keys[path], key)
        totals = {
            of: Moments.total([self.inputs[key] for key in of]) for of in set(keys.values()) if of
        }
        return {path: totals[of] for path, of in keys.items() if of}

    def all_reduce(self, group: Any = None) -> "Statistics":
        """The sum of what all ranks have seen; every rank of the group must call it.

        Args:
            group: a process group; None for all ranks.

        Raises:
            LoRAInjectError: they have watched different layers, or there is no process group.
        """
        from lora_inject.calibration.ranks import across_ranks

        return across_ranks(self, group)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            FormatError: it cannot be written.
        """
        from lora_inject.calibration.stored import write

        write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what ``save`` has written; nothing is unpickled.

        Raises:
            FormatError: it is no such file.
        """
        from lora_inject.calibration.stored import read

        return read(Path(path))

    @property
    def bytes(self) -> int:
        """How much memory the sums take."""
        tensors = [t for m in self.inputs.values() for t in (m.mean, m.scatter)]
        return sum(t.numel() * t.element_size() for t in (*tensors, *self.gradients.values()))

    def _tables(self) -> Tables:
        rows = []
        for paths in self.groups:
            moments = self._moments[paths[0]]
            norms = [float(g.norm()) for p in paths if (g := self.gradient_of(p)) is not None]
            rows.append((
                few(paths),
                count(moments.mean.shape[-1]),
                count(moments.count),
                f"{moments.variance:.4g}",
                f"{moments.dimensions:.1f}",
                f"{max(norms):.4g}" if norms else "-",
            ))  # fmt: skip
        title = (
            f"Statistics of {plural(len(self.layers), 'layer')} that read "
            f"{plural(len(rows), 'input')}, in {plural(self.batches, 'call')} of the model: "
            f"{size(self.bytes)}"
        )
        columns = ("~read by", ">features", ">vectors", ">variance", ">dimensions", ">gradient")
        note = "dimensions: how many directions of equal variance would be as even."
        return Tables([Section(title, columns, rows, [note])])


def joined(inputs: Mapping[Paths, Moments], order: Sequence[str]) -> dict[Paths, Moments]:
    """The inputs with equal ones as one, in the order of the layers.

    Layers may read equal vectors in different tensors, such as views of one.
    """
    found: list[tuple[set[str], Moments]] = []
    for own, moments in inputs.items():
        for known, other in found:
            if other.is_like(moments) and known.isdisjoint(own):
                known.update(own)
                break
        else:
            found.append((set(own), moments))
    place = {path: i for i, path in enumerate(order)}
    keyed: dict[Paths, Moments] = {}
    for paths, moments in found:
        key = tuple(sorted(paths, key=place.__getitem__))
        keyed[key] = keyed[key].plus(moments) if key in keyed else moments
    return {key: keyed[key] for key in sorted(keyed, key=lambda k: [place[path] for path in k])}
