"""What an injection would do: targets and kinds put together and checked, nothing changed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_inject import settings as check
from lora_inject import targets as grammar
from lora_inject.core.look import Look
from lora_inject.errors import (
    AlreadyAdaptedError,
    ArgumentError,
    NoMatchError,
    UnsupportedLayerError,
)
from lora_inject.freeze import in_place, is_given, select_in_full
from lora_inject.in_place import Place
from lora_inject.selection import (
    ALL_LINEAR,
    Choice,
    Limits,
    Skip,
    View,
    choose,
    is_linear_like,
)
from lora_inject.settings import BiasMode, Parts
from lora_inject.sites import Draft, Site, is_adapted
from lora_inject.tables import Section, Tables, count, plural
from lora_inject.targets import Pattern, braces


@dataclass(frozen=True)
class Plan:
    """What ``inject`` would do to a model; ``print`` shows it as a table.

    Attributes:
        look: the model it is for, as it was looked at.
        sites: the layers to adapt, in registration order.
        skipped: what was selected and is left alone, with reasons.
        train_also: the modules that will train in full, by path.
        in_place: what trains in place, and whether it trains itself or only moves.
        adapter: the adapter's name.
        bias: the bias mode.
        seed: the seed of the starting values; None draws one.
    """

    look: Look = field(repr=False)
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    train_also: dict[str, nn.Module] = field(repr=False)
    in_place: dict[Place, bool] = field(repr=False)
    adapter: str
    bias: BiasMode
    seed: int | None

    @property
    def model(self) -> nn.Module:
        """The model it is for."""
        return self.look.model

    @property
    def oversized(self) -> list[Site]:
        """Sites whose adapter has more parameters than what it adapts."""
        return [site for site in self.sites if site.parameters > site.base_elements]

    @property
    def parameters(self) -> int:
        """How many parameters the adapters will have."""
        return sum(site.parameters for site in self.sites)

    def _tables(self) -> Tables:
        sections = [_sites_section(self)]
        if self.train_also:
            sections.append(_train_also_section(self.train_also))
        if self.skipped:
            sections.append(_skipped_section(self.skipped))
        return Tables(sections)

    def __str__(self) -> str:
        return self._tables().text()

    def _repr_html_(self) -> str:
        return self._tables().html()


def plan(
    model: nn.Module,
    targets: Any = ALL_LINEAR,
    *,
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    bias: BiasMode = "none",
    exclude: Any = (),
    layers: Any = None,
    train_also: Any = (),
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    adapter: str = "default",
    how: str = "auto",
    layout: str | None = None,
    parts: Mapping[Any, Any] | None = None,
) -> Plan:
    """Work out what ``inject`` would do with the same arguments; the model is not changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> plan(model, nn.Linear, r=2).parameters
        16

    Args:
        model: any ``nn.Module``.
        targets: the layers to adapt; see ``inject`` for this and all that follow.
        r: rank.
        alpha: scaling is alpha / r.
        dropout: dropout on the adapter's input.
        bias: which biases train.
        exclude: what to leave alone.
        layers: block indices to keep.
        train_also: modules that train in full.
        dtype: dtype of A and B.
        seed: seed of the starting values.
        adapter: the adapter's name.
        how: "auto" or "weight".
        layout: order of the dimensions of fused weights.
        parts: named parts of fused projections.

    Returns:
        The plan, which ``print`` shows as a table.

    Raises:
        ArgumentError: an argument cannot be used; the message starts with its name.
        NoMatchError: a pattern selects nothing, or nothing that can be adapted.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AlreadyAdaptedError: a selected layer already carries an adapter of this name.
    """
    _check_model(model)
    values = {"r": r, "alpha": alpha, "dropout": dropout, "how": how, "layout": layout}
    default = check.settings(values)
    adapter, bias = check.check_adapter(adapter), check.check_bias(bias)
    seed, dtype = check.check_seed(seed), check.check_dtype(dtype)
    indices = check.check_layers(layers)
    words = {ALL_LINEAR: is_linear_like}
    patterns = grammar.parse(targets, "targets", words, with_settings=True)
    excluded = grammar.parse(exclude, "exclude", words) if is_given(exclude) else ()
    given = check.check_parts(parts) if is_given(parts) else {}
    to_part = {grammar.parse(key, "parts")[0]: value for key, value in given.items()}
    settings = {
        p: default
        if p.settings is None
        else check.settings(values, p.settings, f"targets[{p.label!r}]")
        for p in patterns
    }

    look = Look(model)
    view = View(look)
    _check_tree(view)
    look.require_own_record()
    look.require_awake()
    look.require_same_use()
    _check_extension(look, adapter, bias)
    in_full = select_in_full(view, train_also)
    limits = Limits(
        excluded=view.subtrees("exclude", excluded),
        in_full=frozenset(m for top in in_full.values() for m in look.index.below(top)),
        layers=indices,
    )
    draft = Draft(view, adapter, settings, _parts_by_module(view, to_part), limits)
    choices, skips = choose(view, patterns, limits, draft.refusal)
    _check_not_adapted(choices, adapter)
    _check_in_full(look, choices, in_full)
    sites = _with_followers(draft, [draft.site(choice, dtype) for choice in choices])
    _check_parts_used(view, to_part, sites)
    tensors = in_place(look, [s.module for s in sites], bias, [*in_full.values()])
    _check_in_place(look, adapter, tensors)
    return Plan(look, sites, tuple(skips), in_full, tensors, adapter, bias, seed)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be an nn.Module, not a {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedLayerError(
            "the model is a ScriptModule, whose forward cannot be changed.",
            remedy="Adapt it before scripting.",
        )


def _check_tree(view: View) -> None:
    """Refuse what makes any injection wrong, wherever in the model it stands."""
    for place in view.places:
        if isinstance(place.module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise UnsupportedLayerError(
                f"{type(place.module).__name__} would not know of new parameters.",
                path=place.path,
                remedy="Inject first, then wrap the model.",
            )
        for name, parameter in place.module._parameters.items():
            if isinstance(parameter, nn.UninitializedParameter):
                problem, remedy = "it is lazy and has no shape yet.", "Run one forward pass first."
            elif parameter is not None and parameter.is_inference():
                problem = f"its {name} was made in inference mode and can never train again."
                remedy = "Build or load the model outside of torch.inference_mode."
            else:
                continue
            raise UnsupportedLayerError(problem, path=place.path, remedy=remedy)


def _check_extension(look: Look, adapter: str, bias: BiasMode) -> None:
    """Refuse to extend an adapter that is not in use as it is, or in another bias mode."""
    for record in look.records:
        mode = record.modes.get(adapter)
        if mode is not None and record.in_use.get(adapter) != 1.0:
            raise ArgumentError(
                f"adapter: {adapter!r} is there already and not in use with a weight of 1.",
                remedy=f"Call use(model, {adapter!r}) first to add layers to it.",
            )
        if mode is not None and mode.bias != bias:
            raise ArgumentError(
                f"bias={bias!r}, but {adapter!r} was injected with bias={mode.bias!r}.",
                remedy="Use the same mode, and freeze(model, bias=...) to change it.",
            )


def _check_in_place(look: Look, adapter: str, tensors: Collection[Place]) -> None:
    """Refuse to train in place what another adapter in use has trained: one value at a time."""
    for record in look.records:
        for module, name in tensors:
            slot = record.slots.get(module, {}).get(name)
            if slot is not None and slot.inside not in (None, adapter):
                raise ArgumentError(
                    f"{adapter!r} is to train {slot.text}, which {slot.inside!r} has trained and "
                    "which is in use.",
                    remedy="Call use(model) first, which puts no adapter in use.",
                )


def _with_followers(draft: Draft, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites, with one adapter for each tied weight that every place of it shares.

    Raises:
        ArgumentError: targets choose several places of a tied weight with different settings.
    """
    chosen = {(site.module, spec.weight): site for site in sites for spec in site.specs}
    followers: dict[tuple[nn.Module, str], Site] = {}
    for site in sites:
        if (site.module, site.specs[0].weight) in followers:
            continue
        for follower in draft.followers(site):
            key = (follower.module, follower.specs[0].weight)
            if key in chosen and chosen[key].settings != site.settings:
                raise ArgumentError(
                    f"targets: {site.path} and {follower.path} are tied and share one adapter, but "
                    "are given different settings.",
                )
            followers[key] = follower
    leaders = [s for s in sites if (s.module, s.specs[0].weight) not in followers]
    return (*leaders, *followers.values())


def _parts_by_module(view: View, to_part: Mapping[Pattern, Parts]) -> dict[nn.Module, Parts]:
    return {
        place.module: parts
        for pattern, parts in to_part.items()
        for place in view.modules_of("parts", pattern)
    }


def _check_parts_used(view: View, to_part: Mapping[Pattern, Parts], sites: Sequence[Site]) -> None:
    chosen = {site.module for site in sites}
    for pattern in to_part:
        if not any(place.module in chosen for place in view.modules_of("parts", pattern)):
            raise NoMatchError(f"parts: {pattern.label!r} selects no layer that targets choose.")


def _check_in_full(look: Look, choices: Sequence[Choice], in_full: Mapping[str, nn.Module]) -> None:
    """Refuse to adapt what another adapter trains in full, and the other way round."""
    for choice in choices:
        if (name := look.in_full.get(choice.target.module)) is not None:
            raise UnsupportedLayerError(
                f"the adapter {name!r} trains it in full.",
                path=choice.target.path,
                remedy="Exclude it.",
            )
    for path, top in in_full.items():
        for module in look.index.below(top):
            if (state := look.states.get(module)) is not None:
                raise UnsupportedLayerError(
                    f"train_also: the adapter {state.adapters[0].name!r} stands on a layer in it.",
                    path=path,
                    remedy="Take it out of train_also.",
                )


def _check_not_adapted(choices: Sequence[Choice], adapter: str) -> None:
    for choice in choices:
        if is_adapted(choice.target, adapter):
            raise AlreadyAdaptedError(
                f"it already carries the adapter {adapter!r}.",
                path=choice.target.path,
                remedy="Name the new one by adapter=, exclude the layer, or remove the old one.",
            )


def _sites_section(plan: Plan) -> Section:
    """One row for all layers that differ in nothing but the numbers in their paths."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in plan.sites:
        template = tuple(None if part.isdecimal() else part for part in site.path.split("."))
        s = site.settings
        alpha = f"{s.alpha:g}" + (f", dropout {s.dropout:g}" if s.dropout else "")
        kind = site.type + (" (in its weight)" if site.way == "weight" else "")
        parts = "+".join(spec.part for spec in site.specs if spec.part)
        kind += f" ({parts})" if parts else ""
        row = (kind, site.shape_text, f"{s.r}", alpha, site.pattern)
        groups.setdefault((template, row), []).append(site)
    rows = []
    for (_, (kind, shape, r, alpha, pattern)), sites in groups.items():
        path = _common_path([site.path for site in sites])
        total = count(sum(site.parameters for site in sites))
        rows.append((path, kind, shape, r, alpha, count(len(sites)), total, pattern))
    shared = [f"{s.path} is also {', '.join(s.paths[1:])}" for s in plan.sites if len(s.paths) > 1]
    return Section(
        f"Plan: adapter {plan.adapter!r} on {plural(len(plan.sites), 'layer')} of "
        f"{type(plan.model).__name__}, {count(plan.parameters)} parameters, bias={plan.bias!r}",
        ("path", "layer", ">in x out", ">r", ">alpha", ">layers", ">parameters", "chosen by"),
        rows,
        notes=shared,
    )


def _common_path(paths: Sequence[str]) -> str:
    """One path for several that differ in numbers only: 'layers.{0..31}.mlp'."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    merged = [c[0] if len(set(c)) == 1 else braces(map(int, set(c))) for c in columns]
    return ".".join(merged) or "(the model itself)"


def _train_also_section(modules: dict[str, nn.Module]) -> Section:
    rows = [
        (path, type(module).__name__, count(sum(p.numel() for p in module.parameters())))
        for path, module in modules.items()
    ]
    return Section("Train in full (train_also)", ("path", "type", ">parameters"), rows)


def _skipped_section(skips: Sequence[Skip]) -> Section:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for skip in skips:
        groups.setdefault((skip.type, skip.pattern, skip.reason), []).append(skip.path)
    rows = [
        (paths[0] + (f" and {len(paths) - 1} more" if paths[1:] else ""), kind, pattern, reason)
        for (kind, pattern, reason), paths in groups.items()
    ]
    return Section("Skipped", ("path", "type", "selected by", "why"), rows)
