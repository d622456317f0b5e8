"""Which layers the patterns choose, which they leave alone and why, and what to say of mistakes.

A pattern that ends up choosing nothing is always an error, which tells what it met instead.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lora_inject.errors import LoRAInjectError, NoMatchError, UnsupportedLayerError
from lora_inject.heads import find_heads
from lora_inject.kinds import Kind, find_kind
from lora_inject.tables import plural
from lora_inject.targets import Pattern, Place, close_names, in_blocks, walk

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Skip:
    """Something that a pattern selected and that the plan leaves alone, and why."""

    path: str
    type: str
    pattern: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A layer to adapt: the first pattern that selects it is the one that chose it."""

    place: Place
    kind: Kind
    pattern: Pattern


@dataclass(frozen=True)
class Limits:
    """What the targets may select and the plan still leaves alone, module by module."""

    excluded: Mapping[nn.Module, str] = field(default_factory=dict)
    in_full: frozenset[nn.Module] = frozenset()
    layers: tuple[int, ...] | None = None


def is_linear_like(path: str, module: nn.Module) -> bool:
    """The test behind ``"all-linear"``, before heads are left out."""
    kind = find_kind(module)
    return kind is not None and kind.linear_like


class View:
    """A model as planning sees it: its modules, found once, and the questions asked of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places = walk(model)
        self.kinds = {place.module: find_kind(place.module) for place in self.places}
        self.by_path = {path: place.module for place in self.places for path in place.paths}
        self._heads: dict[nn.Module, str] | None = None

    @property
    def heads(self) -> dict[nn.Module, str]:
        """The output heads, looked for when somebody asks."""
        if self._heads is None:
            self._heads = find_heads(self.places)
        return self._heads

    def hits(self, argument: str, patterns: Iterable[Pattern]) -> dict[Pattern, list[Place]]:
        """The modules each pattern selects.

        Raises:
            NoMatchError: a pattern selects neither a module nor a parameter.
        """
        hits = {p: [place for place in self.places if p.selects(place)] for p in patterns}
        lost = [p for p, places in hits.items() if not places and not self.parameters_of(p)]
        if lost:
            raise NoMatchError(
                "\n".join(f"{argument}: {self._no_match(pattern)}" for pattern in lost),
                remedy=f"Names that can be adapted: {listed(self.adaptable_names())}.",
            )
        return hits

    def _no_match(self, pattern: Pattern) -> str:
        names = [path for path in self.by_path if path]
        close = close_names(pattern.label, names) if pattern.by_name else []
        hint = f" Close names: {', '.join(close)}." if close else ""
        return f"{pattern.label!r} matches nothing.{hint}"

    def subtrees(self, argument: str, patterns: Iterable[Pattern]) -> dict[nn.Module, str]:
        """Every module that a pattern selects or that lies below one, with the pattern's label."""
        return {
            module: pattern.label
            for pattern, places in self.hits(argument, patterns).items()
            for place in places
            for module in place.module.modules()
        }

    def trainable_modules(self, argument: str, patterns: Iterable[Pattern]) -> dict[str, nn.Module]:
        """The selected modules by path, each of which must hold something that can train."""
        selected = {
            place.path: place.module
            for places in self.hits(argument, patterns).values()
            for place in places
        }
        for path, module in selected.items():
            if not any(p.is_floating_point() for p in module.parameters()):
                raise NoMatchError(
                    f"{argument} selects this {type(module).__name__}, which has no "
                    "floating-point parameters.",
                    path=path,
                )
        return selected

    def adaptable_names(self) -> list[str]:
        """The last components of the paths of everything that has a kind."""
        names = [p.path.rpartition(".")[2] for p in self.places if self.kinds[p.module] is not None]
        return sorted(set(names))

    def adaptable_below(self, places: Iterable[Place]) -> list[str]:
        """Paths of layers with a kind inside these modules."""
        inside = {module for place in places for module in place.module.modules()}
        return [p.path for p in self.places if p.module in inside and self.kinds[p.module]]

    def parameters_of(self, pattern: Pattern) -> list[tuple[str, nn.Parameter]]:
        """Matrices that the pattern names and that belong to no layer with a kind."""
        if not pattern.by_name:
            return []
        found = [
            (f"{place.path}.{name}".lstrip("."), parameter, place.module)
            for place in self.places
            if self.kinds[place.module] is None
            for name, parameter in place.module._parameters.items()
            if parameter is not None and parameter.dim() > 1
        ]
        return [(path, p) for path, p, owner in found if pattern.test(path, owner)]


def choose(
    view: View,
    patterns: Sequence[Pattern],
    limits: Limits,
    refusal: Callable[[Place, Kind], str | None],
) -> tuple[list[Choice], list[Skip]]:
    """The layers to adapt in registration order, and what is left alone.

    Args:
        view: the model.
        patterns: the targets; the first one that selects a layer chooses it.
        limits: what to leave alone.
        refusal: why a layer cannot be adapted, or None. ``"all-linear"`` leaves such layers alone,
            other patterns have asked for them, so that it is an error.

    Raises:
        NoMatchError: a pattern chooses nothing.
        UnsupportedLayerError: a layer that a pattern asks for cannot be adapted.
    """
    hits = view.hits("targets", patterns)
    outside = _outside(view, hits, limits.layers)
    chosen: dict[nn.Module, Choice] = {}
    skips: dict[str, Skip] = {}
    refused: dict[str, str] = {}
    for pattern, places in hits.items():
        for place in places:
            kind, type_name = view.kinds[place.module], type(place.module).__name__
            reason = _reason_to_leave(view, place, pattern, limits, outside)
            if reason is None and kind is not None:
                reason = refusal(place, kind)
                if reason is not None and pattern.label != ALL_LINEAR:
                    refused[place.path] = reason
            if reason is not None:
                skips.setdefault(place.path, Skip(place.path, type_name, pattern.label, reason))
            elif kind is not None:
                chosen.setdefault(place.module, Choice(place, kind, pattern))
        for path, parameter in view.parameters_of(pattern):
            shape = f"Parameter {tuple(parameter.shape)}"
            reason = "is a parameter, not a layer: cannot be adapted"
            skips.setdefault(path, Skip(path, shape, pattern.label, reason))
    _raise_refused(refused)
    for pattern, places in hits.items():
        _require_choice(view, pattern, places, chosen, skips)
    order = [chosen[place.module] for place in view.places if place.module in chosen]
    return order, [s for s in skips.values() if view.by_path.get(s.path) not in chosen]


def _outside(
    view: View, hits: Mapping[Pattern, Sequence[Place]], layers: tuple[int, ...] | None
) -> set[nn.Module]:
    if layers is None:
        return set()
    selected = [p for places in hits.values() for p in places if view.kinds[p.module] is not None]
    return {place.module for place in selected} - in_blocks(selected, layers, view.model)


def _reason_to_leave(
    view: View, place: Place, pattern: Pattern, limits: Limits, outside: set[nn.Module]
) -> str | None:
    module = place.module
    if module in limits.excluded:
        return f"excluded by {limits.excluded[module]!r}"
    if module in outside:
        return "not in layers="
    if pattern.label == ALL_LINEAR and module in limits.in_full:
        return "trains in full (train_also)"
    if pattern.label == ALL_LINEAR and module in view.heads:
        return view.heads[module]
    if view.kinds[module] is None and any(True for _ in module.parameters(recurse=False)):
        return "no kind of layer that can be adapted"
    return None


def _raise_refused(refused: Mapping[str, str]) -> None:
    if not refused:
        return
    path, reason = next(iter(refused.items()))
    more = [f"\n{other}: {why}" for other, why in list(refused.items())[1:10]]
    if len(refused) > 10:
        more.append(f"\n... and {len(refused) - 10} more.")
    raise UnsupportedLayerError(reason + "".join(more), path=path)


def _require_choice(
    view: View,
    pattern: Pattern,
    places: Sequence[Place],
    chosen: Mapping[nn.Module, Choice],
    skips: Mapping[str, Skip],
) -> None:
    """Raise unless the pattern chose a layer, or had nothing to add to what chose them all."""
    winners = [chosen[place.module].pattern for place in places if place.module in chosen]
    if pattern in winners:
        return
    if winners:
        if any(winner.settings != pattern.settings for winner in winners):
            raise NoMatchError(
                f"targets: {pattern.label!r} selects only layers that {winners[0].label!r} has "
                "chosen before, so its settings would have no effect.",
                remedy="The first pattern that selects a layer decides: put it first.",
            )
        return
    raise _nothing_chosen(view, pattern, places, skips)


def _nothing_chosen(
    view: View, pattern: Pattern, places: Sequence[Place], skips: Mapping[str, Skip]
) -> LoRAInjectError:
    """The error for a pattern that selects something and chooses nothing of it."""
    adaptable = [place for place in places if view.kinds[place.module] is not None]
    if adaptable:
        reasons = Counter(skips[place.path].reason for place in adaptable)
        told = "; ".join(f"{plural(n, 'layer')}: {reason}" for reason, n in reasons.items())
        return NoMatchError(f"targets: {pattern.label!r} chooses nothing. It selects {told}.")
    if places:
        types = ", ".join(dict.fromkeys(type(place.module).__name__ for place in places))
        children = view.adaptable_below(places)
        remedy = (
            f"Layers inside that can be: {listed(children, 6)}."
            if children
            else f"Names that can be adapted: {listed(view.adaptable_names())}."
        )
        return NoMatchError(
            f"targets: {pattern.label!r} selects {plural(len(places), 'module')} of type {types}, "
            "which cannot be adapted.",
            path=places[0].path,
            remedy=remedy,
        )
    path, parameter = view.parameters_of(pattern)[0]
    return NoMatchError(
        f"targets: {pattern.label!r} names a parameter of shape {tuple(parameter.shape)} and not a "
        "layer, which cannot be adapted.",
        path=path,
        remedy=f"Names that can be adapted: {listed(view.adaptable_names())}.",
    )


def listed(names: Sequence[str], most: int = 20) -> str:
    """Some names for a message: 'a, b, c and 4 more'."""
    if not names:
        return "none"
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
