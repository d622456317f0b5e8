"""Which layers the patterns choose, which they leave alone and why, and what to say of mistakes.

A pattern that ends up choosing nothing is always an error, which tells what it met instead.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lora_inject.core.matcher import Matcher, Target, listed
from lora_inject.core.patterns import Pattern, in_blocks
from lora_inject.core.request import ALL_LINEAR
from lora_inject.core.site import Refusal, Site
from lora_inject.errors import (
    AlreadyAdaptedError,
    ArgumentError,
    LoRAInjectError,
    NoMatchError,
    UnsupportedLayerError,
)
from lora_inject.kinds.parameter import layout_of
from lora_inject.kinds.refusals import script_refusal
from lora_inject.printing import plural


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


def choose(
    matcher: Matcher,
    patterns: Sequence[Pattern],
    limits: Limits,
    resolve: Callable[[Target, Pattern], Site | Refusal],
    argument: str = "targets",
) -> tuple[list[Site], list[Skip]]:
    """What to adapt, in registration order, and what is left alone.

    Args:
        matcher: the model.
        patterns: the targets; the first one that selects a layer chooses it.
        limits: what to leave alone.
        resolve: the site that a target is, or why it cannot be one. ``"all-linear"`` leaves what
            is refused alone, other patterns have asked for it, so that it is an error.
        argument: where the patterns come from, for messages.

    Raises:
        NoMatchError: a pattern chooses nothing.
        UnsupportedLayerError: a layer that a pattern asks for cannot be adapted.
        AlreadyAdaptedError: a chosen layer carries an adapter of this name.
    """
    selected = {pattern: matcher.targets_of(pattern) for pattern in patterns}
    lost = [pattern for pattern, targets in selected.items() if not targets]
    if lost:
        raise NoMatchError(
            "\n".join(f"{argument}: {matcher.no_match(pattern)}" for pattern in lost),
            remedy=f"Names that can be adapted: {listed(matcher.adaptable_names())}.",
        )
    outside = _outside(matcher, selected.values(), limits.layers)
    chosen: dict[tuple[nn.Module, str | None], tuple[Target, Pattern, Site | Refusal]] = {}
    skips: dict[str, Skip] = {}
    refused: dict[str, str] = {}
    for pattern, targets in selected.items():
        for target in targets:
            if (target.module, target.parameter) in chosen:
                continue  # the first pattern decides
            reason = _reason_to_leave(matcher, target, pattern, limits, outside)
            found = resolve(target, pattern) if reason is None and matcher.is_able(target) else None
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
        if pattern.label == ALL_LINEAR or pattern.wide:
            _note_matrices(matcher, pattern, limits, skips)
    _raise_refused(refused)
    winners = {key: winner for key, (_, winner, _) in chosen.items()}
    for pattern, targets in selected.items():
        _require_choice(matcher, pattern, targets, winners, skips, argument)
    sites = _in_order(matcher, chosen.values())
    return [*sites.values()], [skip for skip in skips.values() if skip.path not in sites]


def _in_order(
    matcher: Matcher, chosen: Iterable[tuple[Target, Pattern, Site | Refusal]]
) -> dict[str, Site]:
    """The sites by path, in registration order.

    Raises:
        AlreadyAdaptedError: one carries an adapter of this name.
    """
    order = {place.module: index for index, place in enumerate(matcher.places)}
    sites: dict[str, Site] = {}
    for target, _, found in sorted(chosen, key=lambda choice: order[choice[0].module]):
        if isinstance(found, Refusal):
            raise AlreadyAdaptedError(
                found.reason,
                path=target.path,
                remedy="Name the new one by adapter=, exclude the layer, or remove the old one.",
            )
        sites[target.path] = found
    return sites


def _note_matrices(
    matcher: Matcher, pattern: Pattern, limits: Limits, skips: dict[str, Skip]
) -> None:
    """Say of matrices that belong to no layer of a known kind that a pattern leaves them.

    ``"all-linear"`` leaves all of them, a glob or an expression those that it would select too.
    """
    every = pattern.label == ALL_LINEAR
    for target in matcher.factors:
        module = target.module
        if not every and not any(pattern.names(path) for path in target.paths):
            continue
        if module in limits.excluded or module in limits.in_full or module in matcher.heads:
            continue
        if limits.layers is not None and not _lies_in(target, limits.layers, matcher.model):
            continue
        what = "a matrix" if target.tensor.dim() == 2 else "a fused weight"
        layout = "" if layout_of(module, target.tensor) else ", with layout="
        named = f"{what} and no layer: name it to adapt it{layout}"
        reason = script_refusal(module) or named
        skip = Skip(target.path, target.type, pattern.label, reason, wanted=True)
        skips.setdefault(target.path, skip)


def _lies_in(target: Target, layers: tuple[int, ...], model: nn.Module) -> bool:
    try:
        return bool(in_blocks([target.place], layers, model))
    except ArgumentError:
        return False


def _outside(
    matcher: Matcher, selected: Iterable[Sequence[Target]], layers: tuple[int, ...] | None
) -> set[nn.Module]:
    if layers is None:
        return set()
    places = [t.place for targets in selected for t in targets if matcher.is_able(t)]
    return {place.module for place in places} - in_blocks(places, layers, matcher.model)


def _reason_to_leave(
    matcher: Matcher, target: Target, pattern: Pattern, limits: Limits, outside: set[nn.Module]
) -> str | None:
    module = target.module
    if module in limits.excluded:
        return f"excluded by {limits.excluded[module]!r}"
    if module in outside:
        return "not in layers="
    if pattern.label == ALL_LINEAR and module in limits.in_full:
        return "trains in full (train_also)"
    if pattern.label == ALL_LINEAR and module in matcher.heads:
        return matcher.heads[module]
    if not matcher.is_able(target):
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
    matcher: Matcher,
    pattern: Pattern,
    targets: Sequence[Target],
    chosen: Mapping[tuple[nn.Module, str | None], Pattern],
    skips: Mapping[str, Skip],
    argument: str,
) -> None:
    """Raise unless the pattern chose a layer, or had nothing to add to what chose them all."""
    keys = [(target.module, target.parameter) for target in targets]
    winners = [chosen[key] for key in keys if key in chosen]
    if pattern in winners:
        return
    if winners:
        if any(winner.settings != pattern.settings for winner in winners):
            raise NoMatchError(
                f"{argument}: {pattern.label!r} selects only layers that {winners[0].label!r} has "
                "chosen before, so its settings would have no effect.",
                remedy="The first pattern that selects a layer decides: put it first.",
            )
        return
    raise _nothing_chosen(matcher, pattern, targets, skips, argument)


def _nothing_chosen(
    matcher: Matcher, pattern: Pattern, targets: Sequence[Target], skips: Mapping[str, Skip],
    argument: str,
) -> LoRAInjectError:  # fmt: skip
    """The error for a pattern that selects something and chooses nothing of it."""
    able = [target for target in targets if matcher.is_able(target)]
    if able:
        reasons = Counter(skips[target.path].reason for target in able)
        told = "; ".join(f"{plural(n, 'layer')}: {reason}" for reason, n in reasons.items())
        return NoMatchError(f"{argument}: {pattern.label!r} chooses nothing. It selects {told}.")
    types = ", ".join(dict.fromkeys(target.type for target in targets))
    children, matrices = matcher.adaptable_below(targets), matcher.matrices_below(targets)
    remedy = f"Names that can be adapted: {listed(matcher.adaptable_names())}."
    if children:
        remedy = f"Layers inside that can be: {listed(children, 6)}."
    elif matrices:
        remedy = f"Name its matrices instead, such as {listed(matrices, 6)}."
    return NoMatchError(
        f"{argument}: {pattern.label!r} selects {plural(len(targets), 'module')} of type {types}, "
        "which cannot be adapted.",
        path=targets[0].path,
        remedy=remedy,
    )
