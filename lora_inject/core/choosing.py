"""Which layers the patterns choose, which they leave alone and why, and what to say of mistakes.

A pattern that ends up choosing nothing is always an error, which tells what it met instead.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lora_inject.core.matcher import Exclusions, Key, Matcher, Target
from lora_inject.core.patterns import Pattern, in_blocks
from lora_inject.core.request import ALL_LINEAR
from lora_inject.core.resolving import Resolver
from lora_inject.core.site import Site
from lora_inject.errors import (
    ArgumentError,
    LoRAInjectError,
    NoMatchError,
    UnsupportedLayerError,
)
from lora_inject.kinds.parameter import layout_of
from lora_inject.kinds.refusals import script_refusal
from lora_inject.printing import few, plural

OF_PEFT = "is a part of an adapter of PEFT; name it to adapt it"


class Skip(NamedTuple):
    """Something that a pattern selected and that the plan leaves alone, and why.

    ``wanted`` tells that the pattern would have adapted it if it could.
    """

    path: str
    type: str
    pattern: str
    reason: str
    wanted: bool


def choose(resolver: Resolver, argument: str = "targets") -> tuple[list[Site], list[Skip]]:
    """What to adapt, in registration order, and what is left alone.

    Args:
        resolver: the model, with what was asked for. ``"all-linear"`` leaves alone what it refuses;
            other patterns have asked for that, so that it is an error.
        argument: where the patterns come from, for messages.

    Raises:
        NoMatchError: a pattern chooses nothing.
        UnsupportedLayerError: a layer that a pattern asks for cannot be adapted.
        AlreadyAdaptedError: a chosen layer carries an adapter of this name.
    """
    matcher, exclusions = resolver.matcher, resolver.exclusions
    selected = {pattern: matcher.targets_of(pattern) for pattern in resolver.request.settings}
    lost = [pattern for pattern, targets in selected.items() if not targets]
    if lost:
        raise NoMatchError(
            "\n".join(f"{argument}: {matcher.no_match(pattern)}" for pattern in lost),
            remedy=f"Names that can be adapted: {matcher.adaptable_names()}.",
        )
    outside = _outside(matcher, selected.values(), exclusions.layers)
    chosen: dict[Key, tuple[Pattern, Site]] = {}
    skips: dict[str, Skip] = {}
    refused: dict[str, str] = {}
    for pattern, targets in selected.items():
        for target in targets:
            if target.key in chosen:
                continue  # the first pattern decides
            reason, wanted = _reason_to_leave(matcher, target, pattern, exclusions, outside), False
            if reason is None:
                found = resolver.resolve(target, pattern)
                if isinstance(found, Site):
                    chosen[target.key] = pattern, found
                    continue
                reason, wanted = found.reason, True
                if pattern.label != ALL_LINEAR:
                    refused.setdefault(target.path, reason)
            if reason:
                skip = Skip(target.path, target.type, pattern.label, reason, wanted)
                skips.setdefault(target.path, skip)
        if pattern.label == ALL_LINEAR or pattern.wide:
            _note_matrices(matcher, pattern, exclusions, skips)
    _raise_refused(refused)
    winners = {key: winner for key, (winner, _) in chosen.items()}
    for pattern, targets in selected.items():
        _require_choice(matcher, pattern, targets, winners, skips, argument)
    order = {named.module: index for index, named in enumerate(matcher.named)}
    sites = sorted([site for _, site in chosen.values()], key=lambda site: order[site.module])
    paths = {site.path for site in sites}
    return sites, [skip for skip in skips.values() if skip.path not in paths]


def _note_matrices(
    matcher: Matcher, pattern: Pattern, exclusions: Exclusions, skips: dict[str, Skip]
) -> None:
    """Say of matrices that belong to no layer of a known kind that a pattern leaves them.

    ``"all-linear"`` leaves all of them, a glob or an expression those that it would select too.
    """
    every = pattern.label == ALL_LINEAR
    for target in matcher.factors:
        module = target.module
        if not every and not any(pattern.names(path) for path in target.paths):
            continue
        left = exclusions.excluded, exclusions.in_full, matcher.heads, matcher.look.of_peft
        if any(module in modules for modules in left):
            continue
        if exclusions.layers is not None and not _lies_in(target, exclusions.layers, matcher.model):
            continue
        what = "a matrix" if target.tensor.dim() == 2 else "a fused weight"
        layout = "" if layout_of(module, target.tensor) else ", with layout="
        named = f"{what} and no layer: name it to adapt it{layout}"
        reason = script_refusal(module) or named
        skip = Skip(target.path, target.type, pattern.label, reason, wanted=True)
        skips.setdefault(target.path, skip)


def _lies_in(target: Target, layers: tuple[int, ...], model: nn.Module) -> bool:
    try:
        return bool(in_blocks([target.named], layers, model))
    except ArgumentError:
        return False


def _outside(
    matcher: Matcher, selected: Iterable[Sequence[Target]], layers: tuple[int, ...] | None
) -> set[nn.Module]:
    if layers is None:
        return set()
    able = [t.named for targets in selected for t in targets if matcher.is_able(t)]
    return {named.module for named in able} - in_blocks(able, layers, matcher.model)


def _reason_to_leave(
    matcher: Matcher,
    target: Target,
    pattern: Pattern,
    exclusions: Exclusions,
    outside: set[nn.Module],
) -> str | None:
    """Why a target is left alone; "" for a container, of which nothing is said."""
    module = target.module
    if module in exclusions.excluded:
        return f"excluded by {exclusions.excluded[module]!r}"
    if module in outside:
        return "not in layers="
    if pattern.last is None and module in matcher.look.of_peft:  # none that names it
        return OF_PEFT
    if pattern.label == ALL_LINEAR and module in exclusions.in_full:
        return "trains in full (train_also)"
    if pattern.label == ALL_LINEAR and module in matcher.heads:
        return matcher.heads[module]
    if not matcher.is_able(target):
        owns = any(p is not None for p in module._parameters.values())
        return "no kind of layer that can be adapted" if owns else ""
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
    chosen: Mapping[Key, Pattern],
    skips: Mapping[str, Skip],
    argument: str,
) -> None:
    """Raise unless the pattern chose a layer, or had nothing to add to what chose them all."""
    winners = [chosen[target.key] for target in targets if target.key in chosen]
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
    remedy = f"Names that can be adapted: {matcher.adaptable_names()}."
    if children:
        remedy = f"Layers inside that can be: {few(children, 6)}."
    elif matrices:
        remedy = f"Name its matrices instead, such as {few(matrices, 6)}."
    return NoMatchError(
        f"{argument}: {pattern.label!r} selects {plural(len(targets), 'module')} of type {types}, "
        "which cannot be adapted.",
        path=targets[0].path,
        remedy=remedy,
    )
