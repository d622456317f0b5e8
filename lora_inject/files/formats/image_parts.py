"""What of a file for images is for a model: one file can be for a whole pipeline.

Names are looked up among those that the modules of the model have in every style that is read;
none is taken to pieces. What stands in front of one says for which part of a pipeline it is, and
what stands behind it which tensor of an adapter.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.core.paths import bare, bare_modules, outputs
from lora_inject.errors import FormatError
from lora_inject.files.formats import lycoris
from lora_inject.files.formats.image_names import DOTTED, FLAT, LEVEL, Slot, family_of, labels_of

Slots = tuple[Slot, ...]

# The tensors of a layer, by the names that kohya's files and LyCORIS have for them.
DOWN, UP, MID, ALPHA = "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha"
SCALE, LENGTHS = "dora_scale", "lora_magnitude_vector"
_ENDINGS = {
    **{f".{kind}": kind for kind in (DOWN, UP, MID, ALPHA, SCALE, LENGTHS, *lycoris.KEYS)},
    **{f".lora_A{adapter}.weight": DOWN for adapter in ("", ".default")},  # PEFT's
    **{f".lora_B{adapter}.weight": UP for adapter in ("", ".default")},
    f".{LENGTHS}.weight": LENGTHS,
    **{  # diffusers' before it had PEFT's
        f"{between}.{last}": kind
        for between in (".lora", "_lora", ".lora_linear_layer")
        for last, kind in (("down.weight", DOWN), ("up.weight", UP), ("alpha", ALPHA))
    },
}
_FRONTS = sorted(
    [(f"{front}.", label, False) for front, label in DOTTED.items()]
    + [(f"{front}_", label, True) for front, label in FLAT.items()],
    key=lambda item: -len(item[0]),
)
_LONGEST_FIRST = sorted(_ENDINGS.items(), key=lambda item: -len(item[0]))


def layers_of(
    tensors: Mapping[str, Tensor], where: Path
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """(the tensors of each layer, by its name in the file and by what they are; other keys).

    Raises:
        FormatError: a tensor is there under two names.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        ending, kind = next((e for e in _LONGEST_FIRST if key.endswith(e[0])), ("", ""))
        if not kind:
            others.append(key)
            continue
        own = layers.setdefault(key.removesuffix(ending), {})
        if kind in own:
            raise FormatError(f"{where}: the tensor {key} is there under another name too.")
        own[kind] = tensor
    return layers, others


class Place(NamedTuple):
    """A name of a file.

    Attributes:
        label: the part of a pipeline that it is for; "" where nothing says so.
        front: what stands in front of it in the file.
        slots: our modules that it can mean, each with the others that it is fused with.
    """

    label: str
    front: str
    slots: tuple[Slots, ...]


@dataclass(frozen=True)
class Choice:
    """What of a file is for a model.

    Attributes:
        slots: our modules by the name in the file.
        left: how many names are for other parts of a pipeline, by what stands in front of them.
        labels: the parts of a pipeline that the model is meant to be.
    """

    slots: Mapping[str, Slots]
    left: Mapping[str, int] = field(default_factory=dict)
    labels: Collection[str] = ()

    @property
    def is_plain(self) -> bool:
        """Whether each name is one whole module."""
        return all(len(own) == 1 and not own[0].exchanged for own in self.slots.values())


class ModelNames:
    """The names that files can have for the modules of a model.

    Args:
        index: the modules of the model.
        component: what it is in its pipeline, where that is known.
    """

    def __init__(self, index: Index, component: str = "") -> None:
        self.modules = bare_modules(index.by_path)
        self.model_class = type(bare(index.model)).__name__
        self.family = family_of(self.model_class)
        self.component = component
        self.labels = labels_of(component, self.family)
        self._dotted: dict[str, dict[Slots, None]] = {}
        self._flat: dict[str, dict[Slots, None]] = {}
        layers = {path: m for path, m in self.modules.items() if m._parameters or outputs(m)}
        for style in self.family.styles:
            for name, slots in style(layers).items():
                self._dotted.setdefault(name, {})[slots] = None
                self._flat.setdefault(name.replace(".", "_"), {})[slots] = None

    def place(self, name: str) -> Place:
        """What a name of a file means."""
        if name in self._dotted:
            return Place("", "", tuple(self._dotted[name]))
        for front, label, is_flat in _FRONTS:
            if name.startswith(front):
                table = self._flat if is_flat else self._dotted
                return Place(label, front[:-1], tuple(table.get(name.removeprefix(front), ())))
        return Place("", "", ())

    def choose(self, names: Collection[str], rows: Mapping[str, int], where: Path) -> Choice:
        """What of a file is for this model.

        Args:
            names: those of the file.
            rows: how many outputs the tensors of a name are for, where they tell.
            where: the file, for errors.

        Raises:
            FormatError: a name is not, or not uniquely, one of the model's; or nothing is for it,
                and it is not one component of several.
        """
        places = {name: self.place(name) for name in names}
        labels = self._labels_in(places, rows)
        chosen = {n: p for n, p in places.items() if p.label in labels}
        left = Counter(sorted(place.front for n, place in places.items() if n not in chosen))
        unknown = [name for name, place in chosen.items() if not place.slots]
        if unknown or not (chosen or self.component):
            shown, n = unknown or list(names), len(unknown or names)
            raise FormatError(
                f"{where}: {n:,} names are no modules of this {self.model_class}: "
                f"{', '.join(shown[:3])}{', ...' if shown[3:] else ''}."
            )
        for name, place in chosen.items():
            if len(place.slots) > 1:
                one, other = (slots[0].path for slots in place.slots[:2])
                raise FormatError(f"{where}: {name} can be {one} or {other} of this model.")
        return Choice({name: place.slots[0] for name, place in chosen.items()}, left, labels)

    def _labels_in(self, places: Mapping[str, Place], rows: Mapping[str, int]) -> set[str]:
        """The labels of the names that are meant for this model."""
        known = {place.label for place in places.values() if place.slots}
        if not self.labels:  # any model: whatever of the file names its modules
            return known or {place.label for place in places.values()}
        there = [label for label in self.labels if any(p.label == label for p in places.values())]
        best = [label for label in there if self._fits(label, places, rows)]
        first = next(iter(best or [own for own in there if own in known] or there), "")
        return {first, ""}

    def tensor(self, name: str) -> str:
        """The name of a tensor of the base, whichever version of transformers wrote it."""
        for own in (name, name.removeprefix(LEVEL), LEVEL + name):
            if own.partition(".")[0] in self.modules:
                return own
        return name

    def sizes(self, slots: Slots) -> list[int]:
        """How many outputs each of some modules has."""
        return [outputs(self.modules[slot.path]) for slot in slots]

    def _fits(self, label: str, places: Mapping[str, Place], rows: Mapping[str, int]) -> bool:
        """Whether all of a part are modules of the model, of the sizes that the file says."""
        own = [(name, place.slots) for name, place in places.items() if place.label == label]
        return all(
            slots and (name not in rows or sum(self.sizes(slots[0])) in (0, rows[name]))
            for name, slots in own
        )
