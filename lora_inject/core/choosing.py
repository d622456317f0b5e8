"""Which layers the patterns choose, which they leave alone and why, and what to say of mistakes.

A pattern that ends up choosing nothing is always an error, which tells what it met instead.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from torch import nn

from lora_inject.core.look import Look
from lora_inject.core.output_heads import find_heads
from lora_inject.core.patterns import Pattern, Place, close_names, in_blocks
from lora_inject.core.request import ALL_LINEAR
from lora_inject.core.site import Refusal, Site
from lora_inject.errors import (
    AlreadyAdaptedError,
    LoRAInjectError,
    NoMatchError,
    UnsupportedLayerError,
)
from lora_inject.kinds import Kind, find_kind
from lora_inject.kinds.bias import is_bias
from lora_inject.printing import plural
from lora_inject.sharding import whole_shape


class Target(NamedTuple):
    """Something that a pattern can select: a module, or with a name one of its own parameters."""

    place: Place
    parameter: str | None = None

    @property
    def path(self) -> str:
        """Its first path in the model."""
        return self.paths[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """All of its paths."""
        if self.parameter is None:
            return self.place.paths
        return tuple(f"{path}.{self.parameter}".lstrip(".") for path in self.place.paths)

    @property
    def module(self) -> nn.Module:
        """The module, or the owner of the parameter."""
        return self.place.module

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter itself, which an adapted module shows in another form."""
        parameter = self.module._parameters[self.parameter or ""]
        assert parameter is not None
        return parameter

    @property
    def type(self) -> str:
        """Its type in words."""
        if self.parameter is None:
            return type(self.module).__name__
        return f"Parameter {tuple(self.tensor.shape)}"


class Skip(NamedTuple):
    """Something that a pattern selected and that the plan leaves alone, and why.

    ``wanted`` tells that the pattern would have adapted it if it could.
    """

    path: str
    type: str
    pattern: str
    reason: str
    wanted: bool = False


class Limits(NamedTuple):
    """What the targets may select and the plan still leaves alone, module by module."""

    excluded: Mapping[nn.Module, str] = {}
    in_full: frozenset[nn.Module] = frozenset()
    layers: tuple[int, ...] | None = None


class View:
    """A model as planning sees it, and the questions asked of it."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.model = look.model
        self.places = look.index.places
        self.by_path = look.index.by_path
        self._kinds: dict[nn.Module, Kind | None] = {}

    def kind(self, module: nn.Module) -> Kind | None:
        """The kind of a module, or None where there is none."""
        if module not in self._kinds:
            self._kinds[module] = find_kind(module)
        return self._kinds[module]

    def is_able(self, target: Target) -> bool:
        """Whether a target is a layer with a kind, or a parameter."""
        return target.parameter is not None or self.kind(target.place.module) is not None

    @cached_property
    def heads(self) -> dict[nn.Module, str]:
        """The output heads, looked for when somebody asks."""
        return find_heads(self.places)

    @cached_property
    def matrices(self) -> list[Target]:
        """Parameters of two dimensions or more that belong to no layer with a kind."""
        return [
            Target(place, name)
            for place in self.places
            if len(place.module._parameters)
            for name, parameter in place.module._parameters.items()
            if parameter is not None and len(whole_shape(parameter)) > 1
            if self.kind(place.module) is None and not is_bias(place.module, name)
        ]

    def modules_of(self, argument: str, pattern: Pattern) -> list[Place]:
        """The modules that a pattern of ``exclude`` or ``train_also`` selects.

        Raises:
            NoMatchError: there is none.
        """
        places = self._selected(pattern)
        if places:
            return places
        named = pattern.by_name and any(
            pattern.names(path) for t in self.matrices for path in t.paths
        )
        remedy = "It names a parameter; name the module that owns it." if named else ""
        raise NoMatchError(f"{argument}: {self.no_match(pattern)}", remedy=remedy)

    def _selected(self, pattern: Pattern) -> list[Place]:
        """The modules that a pattern selects; of a plain name only those that end so are asked."""
        if pattern.last is None:
            return [place for place in self.places if pattern.selects(place)]
        return [place for place in self._by_last.get(pattern.last, ()) if pattern.selects(place)]

    @cached_property
    def _by_last(self) -> dict[str, list[Place]]:
        """The modules by the last components of their paths."""
        found: dict[str, list[Place]] = {}
        for place in self.places:
            for last in {path.rpartition(".")[2] for path in place.paths}:
                found.setdefault(last, []).append(place)
        return found

    def targets_of(self, pattern: Pattern) -> list[Target]:
        """What a target pattern selects: modules, and parameters that it names.

        A glob or an expression names parameters only if it selects no layer: written for layers,
        it would otherwise catch every matrix on the way.
        """
        selected = [Target(place) for place in self._selected(pattern)]
        exact = pattern.by_name and not pattern.wide
        if exact or (pattern.by_name and not any(map(self.is_able, selected))):
            selected += [t for t in self.matrices if any(pattern.names(path) for path in t.paths)]
        return selected

    def no_match(self, pattern: Pattern) -> str:
        """The sentence for a pattern that selects nothing."""
        names = [path for path in self.by_path if path] + [t.path for t in self.matrices]
        close = close_names(pattern.label, names) if pattern.by_name else []
        hint = f" Close names: {', '.join(close)}." if close else ""
        return f"{pattern.label!r} matches nothing.{hint}"

    def subtrees(self, argument: str, patterns: Iterable[Pattern]) -> dict[nn.Module, str]:
        """Every module that a pattern selects or that lies below one, with the pattern's label."""
        return {
            module: pattern.label
            for pattern in patterns
            for place in self.modules_of(argument, pattern)
            for module in self.look.index.below(place.module)
        }

    def trainable_modules(self, argument: str, patterns: Iterable[Pattern]) -> dict[str, nn.Module]:
        """The selected modules by path that hold something that can train.

        Raises:
            NoMatchError: a pattern selects no such module.
        """
        selected: dict[str, nn.Module] = {}
        for pattern in patterns:
            places = self.modules_of(argument, pattern)
            able = {place.path: place.module for place in places if self._can_train(place.module)}
            if not able:
                raise NoMatchError(
                    f"{argument}: {pattern.label!r} selects no module with floating-point "
                    "parameters.",
                    path=places[0].path,
                    remedy="Name a module that can train.",
                )
            selected |= able
        return selected

    def _can_train(self, top: nn.Module) -> bool:
        own = [p for module in self.look.index.below(top) for p in module._parameters.values()]
        return any(p is not None and p.is_floating_point() for p in own)

    def adaptable_names(self) -> list[str]:
        """The last components of the paths of everything that has a kind."""
        names = [p.path.rpartition(".")[2] for p in self.places if self.kind(p.module) is not None]
        return sorted(set(names) - {""})

    def adaptable_below(self, targets: Iterable[Target]) -> list[str]:
        """Paths of layers with a kind inside these modules."""
        inside = {m for target in targets for m in self.look.index.below(target.module)}
        return [p.path for p in self.places if p.module in inside and self.kind(p.module)]


def choose(
    view: View,
    patterns: Sequence[Pattern],
    limits: Limits,
    resolve: Callable[[Target, Pattern], Site | Refusal],
) -> tuple[list[Site], list[Skip]]:
    """What to adapt, in registration order, and what is left alone.

    Args:
        view: the model.
        patterns: the targets; the first one that selects a layer chooses it.
        limits: what to leave alone.
        resolve: the site that a target is, or why it cannot be one. ``"all-linear"`` leaves what
            is refused alone, other patterns have asked for it, so that it is an error.

    Raises:
        NoMatchError: a pattern chooses nothing.
        UnsupportedLayerError: a layer that a pattern asks for cannot be adapted.
        AlreadyAdaptedError: a chosen layer carries an adapter of this name.
    """
    selected = {pattern: view.targets_of(pattern) for pattern in patterns}
    lost = [pattern for pattern, targets in selected.items() if not targets]
    if lost:
        raise NoMatchError(
            "\n".join(f"targets: {view.no_match(pattern)}" for pattern in lost),
            remedy=f"Names that can be adapted: {listed(view.adaptable_names())}.",
        )
    outside = _outside(view, selected.values(), limits.layers)
    chosen: dict[tuple[nn.Module, str | None], tuple[Target, Pattern, Site | Refusal]] = {}
    skips: dict[str, Skip] = {}
    refused: dict[str, str] = {}
    for pattern, targets in selected.items():
        for target in targets:
            reason = _reason_to_leave(view, target, pattern, limits, outside)
            found = resolve(target, pattern) if reason is None and view.is_able(target) else None
            refusal = found if isinstance(found, Refusal) and not found.conflict else None
            if refusal is not None and pattern.label != ALL_LINEAR:
                refused.setdefault(target.path, refusal.reason)
            if reason or refusal:
                why = refusal.reason if refusal else reason or ""
                skip = Skip(target.path, target.type, pattern.label, why, wanted=bool(refusal))
                skips.setdefault(target.path, skip)
            elif found is not None:
                key = (target.module, target.parameter)
                chosen.setdefault(key, (target, pattern, found))
        if pattern.label == ALL_LINEAR:
            _note_matrices(view, limits, skips)
    _raise_refused(refused)
    winners = {key: winner for key, (_, winner, _) in chosen.items()}
    for pattern, targets in selected.items():
        _require_choice(view, pattern, targets, winners, skips)
    order = {place.module: index for index, place in enumerate(view.places)}
    sites: dict[str, Site] = {}
    for target, _, found in sorted(chosen.values(), key=lambda choice: order[choice[0].module]):
        if isinstance(found, Refusal):
            raise AlreadyAdaptedError(
                found.reason,
                path=target.path,
                remedy="Name the new one by adapter=, exclude the layer, or remove the old one.",
            )
        sites[target.path] = found
    return [*sites.values()], [skip for skip in skips.values() if skip.path not in sites]


def _note_matrices(view: View, limits: Limits, skips: dict[str, Skip]) -> None:
    """Say of fused weights, which are Linear in all but form, that all-linear leaves them."""
    for target in view.matrices:
        fused = target.tensor.dim() == 3
        experts = hasattr(target.module, "num_experts")
        if fused and experts and target.module not in limits.excluded:
            reason = "a fused weight and no layer: name it to adapt it"
            skip = Skip(target.path, target.type, ALL_LINEAR, reason, wanted=True)
            skips.setdefault(target.path, skip)


def _outside(
    view: View, selected: Iterable[Sequence[Target]], layers: tuple[int, ...] | None
) -> set[nn.Module]:
    if layers is None:
        return set()
    places = [t.place for targets in selected for t in targets if view.is_able(t)]
    return {place.module for place in places} - in_blocks(places, layers, view.model)


def _reason_to_leave(
    view: View, target: Target, pattern: Pattern, limits: Limits, outside: set[nn.Module]
) -> str | None:
    module = target.module
    if module in limits.excluded:
        return f"excluded by {limits.excluded[module]!r}"
    if module in outside:
        return "not in layers="
    if pattern.label == ALL_LINEAR and module in limits.in_full:
        return "trains in full (train_also)"
    if pattern.label == ALL_LINEAR and module in view.heads:
        return view.heads[module]
    if not view.is_able(target):
        owns = any(p is not None for p in module._parameters.values())
        return "no kind of layer that can be adapted" if owns else None
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
    targets: Sequence[Target],
    chosen: Mapping[tuple[nn.Module, str | None], Pattern],
    skips: Mapping[str, Skip],
) -> None:
    """Raise unless the pattern chose a layer, or had nothing to add to what chose them all."""
    keys = [(target.module, target.parameter) for target in targets]
    winners = [chosen[key] for key in keys if key in chosen]
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
    raise _nothing_chosen(view, pattern, targets, skips)


def _nothing_chosen(
    view: View, pattern: Pattern, targets: Sequence[Target], skips: Mapping[str, Skip]
) -> LoRAInjectError:
    """The error for a pattern that selects something and chooses nothing of it."""
    able = [target for target in targets if view.is_able(target)]
    if able:
        reasons = Counter(skips[target.path].reason for target in able)
        told = "; ".join(f"{plural(n, 'layer')}: {reason}" for reason, n in reasons.items())
        return NoMatchError(f"targets: {pattern.label!r} chooses nothing. It selects {told}.")
    types = ", ".join(dict.fromkeys(target.type for target in targets))
    children = view.adaptable_below(targets)
    remedy = (
        f"Layers inside that can be: {listed(children, 6)}."
        if children
        else f"Names that can be adapted: {listed(view.adaptable_names())}."
    )
    return NoMatchError(
        f"targets: {pattern.label!r} selects {plural(len(targets), 'module')} of type {types}, "
        "which cannot be adapted.",
        path=targets[0].path,
        remedy=remedy,
    )


def listed(names: Sequence[str], most: int = 20) -> str:
    """Some names for a message: 'a, b, c and 4 more'."""
    if not names:
        return "none"
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
