"""What an injection would do: targets and kinds put together and checked, nothing changed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject import settings as check
from lora_inject import targets as grammar
from lora_inject.errors import AlreadyAdaptedError, ArgumentError, UnsupportedLayerError
from lora_inject.kinds import Kind
from lora_inject.kinds.base import general_refusal, unread_refusal, weight_refusal
from lora_inject.layer import LoRALayer, parameter_names
from lora_inject.selection import ALL_LINEAR, Choice, Limits, Skip, View, choose, is_linear_like
from lora_inject.settings import BiasMode, Settings
from lora_inject.tables import Section, Tables, count, plural
from lora_inject.targets import Place, braces


@dataclass(frozen=True)
class Site:
    """One layer that the plan adapts.

    Attributes:
        paths: its names in the model, the first in registration order first.
        module: the layer itself.
        kind: how it is adapted.
        n_in: features that A reads.
        n_out: features that B writes.
        settings: rank, alpha and dropout.
        dtype: the dtype of A and B.
        pattern: the target pattern that chose it.
    """

    paths: tuple[str, ...]
    module: nn.Module = field(repr=False)
    kind: Kind = field(repr=False)
    n_in: int
    n_out: int
    settings: Settings
    dtype: torch.dtype
    pattern: str

    @property
    def path(self) -> str:
        """The layer's first name."""
        return self.paths[0]

    @property
    def parameters(self) -> int:
        """How many parameters A and B have."""
        return self.settings.r * (self.n_in + self.n_out)


@dataclass(frozen=True)
class Plan:
    """What ``inject`` would do to a model; ``print`` shows it as a table.

    Attributes:
        model: the model it is for.
        sites: the layers to adapt, in registration order.
        skipped: what was selected and is left alone, with reasons.
        train_also: the modules that will train in full, by path.
        adapter: the adapter's name.
        bias: the bias mode.
        seed: the seed of the starting values; None draws one.
    """

    model: nn.Module = field(repr=False)
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    train_also: dict[str, nn.Module] = field(repr=False)
    adapter: str
    bias: BiasMode
    seed: int | None

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

    Returns:
        The plan, which ``print`` shows as a table.

    Raises:
        ArgumentError: an argument cannot be used; the message starts with its name.
        NoMatchError: a pattern selects nothing, or nothing that can be adapted.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AlreadyAdaptedError: a selected layer already carries an adapter.
    """
    _check_model(model)
    default = check.settings(r, alpha, dropout)
    adapter, bias = check.check_adapter(adapter), check.check_bias(bias)
    seed, dtype = check.check_seed(seed), check.check_dtype(dtype)
    layers = check.check_layers(layers)
    words = {ALL_LINEAR: is_linear_like}
    patterns = grammar.parse(targets, "targets", words, with_settings=True)
    excluded = grammar.parse(exclude, "exclude", words) if _is_given(exclude) else ()
    trained = grammar.parse(train_also, "train_also") if _is_given(train_also) else ()
    settings = {
        p: default
        if p.settings is None
        else check.settings(r, alpha, dropout, p.settings, f"targets[{p.label!r}]")
        for p in patterns
    }

    view = View(model)
    _check_tree(view)
    in_full = view.trainable_modules("train_also", trained)
    limits = Limits(
        excluded=view.subtrees("exclude", excluded),
        in_full=frozenset(m for top in in_full.values() for m in top.modules()),
        layers=layers,
    )
    names = parameter_names(adapter)
    choices, skips = choose(
        view, patterns, limits, lambda place, kind: _refusal(view, place, kind, names, limits)
    )
    _check_not_adapted(choices, adapter)
    sites = tuple(_site(choice, settings[choice.pattern], dtype) for choice in choices)
    return Plan(model, sites, tuple(skips), in_full, adapter, bias, seed)


def _is_given(patterns: Any) -> bool:
    return not (patterns is None or (isinstance(patterns, Sequence | set) and len(patterns) == 0))


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
        if any(_is_lazy(parameter) for parameter in place.module._parameters.values()):
            raise UnsupportedLayerError(
                "it is lazy and has no shape yet.",
                path=place.path,
                remedy="Run one forward pass first.",
            )


def _is_lazy(parameter: nn.Parameter | None) -> bool:
    return isinstance(parameter, nn.UninitializedParameter)


def _refusal(
    view: View, place: Place, kind: Kind, names: tuple[str, str], limits: Limits
) -> str | None:
    module = place.module
    if isinstance(module, LoRALayer):
        return None  # a conflict and not a refusal: see _check_not_adapted
    if module in limits.in_full:
        return "it is to be adapted and to train in full. Exclude it, or take it out of train_also."
    for path in place.paths:
        parent, _, name = path.rpartition(".")
        if path and (reason := unread_refusal(view.by_path[parent], name)):
            return reason
    return (
        general_refusal(module, names)
        or kind.refusal(module)
        or weight_refusal(kind.weight(module), kind.features(module))
    )


def _check_not_adapted(choices: Sequence[Choice], adapter: str) -> None:
    for choice in choices:
        layer = choice.place.module
        if isinstance(layer, LoRALayer):
            there = ", ".join(map(repr, layer.adapters))
            raise AlreadyAdaptedError(
                f"it already carries the adapter {there}, and a layer holds one.",
                path=choice.place.path,
                remedy="strip the model first, or exclude the layer.",
            )


def _site(choice: Choice, settings: Settings, dtype: torch.dtype | str | None) -> Site:
    place, kind = choice.place, choice.kind
    n_in, n_out = kind.features(place.module)
    adapter_dtype = _adapter_dtype(kind.weight(place.module), dtype, place.path)
    label = choice.pattern.label
    return Site(place.paths, place.module, kind, n_in, n_out, settings, adapter_dtype, label)


def _adapter_dtype(weight: Tensor, dtype: torch.dtype | str | None, path: str) -> torch.dtype:
    """float32 over a 16-bit or quantized base, else the base's, unless the user says otherwise."""
    if isinstance(dtype, torch.dtype):
        return dtype
    can_train = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    if dtype == "base" and not can_train:
        raise ArgumentError(
            f'dtype="base": the base weight is {weight.dtype}, in which nothing can train.',
            path=path,
            remedy="Name a dtype, such as torch.bfloat16.",
        )
    if dtype == "base" or (can_train and weight.dtype.itemsize > 2):
        return weight.dtype
    return torch.float32


def _sites_section(plan: Plan) -> Section:
    """One row for all layers that differ in nothing but the numbers in their paths."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in plan.sites:
        s = site.settings
        row = (
            ".".join("{}" if part.isdecimal() else part for part in site.path.split(".")),
            type(site.module).__name__,
            f"{site.n_in} x {site.n_out}",
            f"{s.r}",
            f"{s.alpha:g}" + (f", dropout {s.dropout:g}" if s.dropout else ""),
            site.pattern,
        )
        groups.setdefault(row, []).append(site)
    rows = []
    for (_, layer, shape, r, alpha, pattern), sites in groups.items():
        path = _common_path([site.path for site in sites])
        total = count(sum(site.parameters for site in sites))
        rows.append((path, layer, shape, r, alpha, count(len(sites)), total, pattern))
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
