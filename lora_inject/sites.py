"""From a selected target to a site: its kind, way and pairs, or why it cannot be adapted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lora_inject.adapter import adapters_of, parameter_names
from lora_inject.errors import ArgumentError, UnsupportedLayerError
from lora_inject.kinds import Kind, Spec
from lora_inject.kinds.base import Way, general_refusal, weight_refusal
from lora_inject.kinds.parameter import ParameterKind, layout_of
from lora_inject.placements import is_placeholder, whole_numel
from lora_inject.readers import is_read_by
from lora_inject.selection import Choice, Limits, Target, View
from lora_inject.settings import Parts, Settings
from lora_inject.targets import Pattern, Place


@dataclass(frozen=True)
class Site:
    """One layer, or one parameter, that the plan adapts.

    Attributes:
        paths: its names in the model, the first in registration order first.
        type: its type in words.
        module: the layer itself, or the owner of the parameter.
        kind: the kind of layer.
        way: "branch" or "weight".
        specs: the pairs A, B that it gets.
        settings: rank, alpha, dropout and the rest.
        dtype: the dtype of A and B.
        pattern: the target pattern that chose it.
        base_elements: elements of the weights that it adapts.
        follows: the path of the site whose A and B it shares, since the weight is tied; or "".
    """

    paths: tuple[str, ...]
    type: str
    module: nn.Module = field(repr=False)
    kind: Kind = field(repr=False)
    way: Way
    specs: tuple[Spec, ...]
    settings: Settings
    dtype: torch.dtype
    pattern: str
    base_elements: int
    follows: str = ""

    @property
    def path(self) -> str:
        """Its first name."""
        return self.paths[0]

    @property
    def parameters(self) -> int:
        """How many parameters A and B have; none of its own where it shares them."""
        return 0 if self.follows else sum(spec.elements for spec in self.specs)

    @property
    def shape_text(self) -> str:
        """The features that A reads and B writes, for a table."""
        shown = {
            (f"{spec.experts} x " if spec.experts else "") + f"{spec.n_in} x {spec.n_out}": None
            for spec in self.specs
        }
        return ", ".join(shown)


@dataclass(frozen=True)
class Draft:
    """What turns a selected target into a site, or says why it cannot be one.

    Attributes:
        view: the model.
        adapter: the adapter's name.
        settings: those of each pattern.
        parts: the parts of fused projections.
        limits: what is not to be adapted.
        read: for layers that were asked about, whether something reads their weight uncalled.
    """

    view: View
    adapter: str
    settings: Mapping[Pattern, Settings]
    parts: Mapping[nn.Module, Parts]
    limits: Limits
    read: dict[nn.Module, bool] = field(default_factory=dict)

    def refusal(self, target: Target, pattern: Pattern) -> str | None:
        """Why the target cannot be adapted, with the remedy; None where it can."""
        module, settings = target.module, self.settings_of(target, pattern)
        if module in self.limits.in_full:
            return (
                "it is to be adapted and to train in full. Exclude it, or take it out of "
                "train_also."
            )
        if target.parameter is not None and is_placeholder(target.tensor):
            return "ZeRO-3 has partitioned it. Inject before deepspeed.zero.Init, or exclude it."
        kind = self.kind_of(target, settings)
        if kind is None:
            return (
                "it has three dimensions, and nothing tells which order they have. Say "
                'layout="out_in" for (E, out, in) or layout="in_out" for (E, in, out).'
                if target.tensor.dim() == 3
                else "only parameters of two or three dimensions can be adapted. Exclude it."
            )
        if is_adapted(target, self.adapter):
            return None  # a conflict and not a refusal, which the plan raises
        way = self.way_of(target, kind, settings)
        return _refusal(module, kind, way, settings, self.adapter)

    def settings_of(self, target: Target, pattern: Pattern) -> Settings:
        """The pattern's settings with the layer's parts."""
        parts = self.parts.get(target.module, ())
        return replace(self.settings[pattern], parts=parts) if parts else self.settings[pattern]

    def kind_of(self, target: Target, settings: Settings) -> Kind | None:
        """The kind of a module; for a parameter one with its layout, where that is known."""
        if target.parameter is None:
            return self.view.kinds[target.module]
        parameter = target.tensor
        layout = settings.layout or layout_of(target.module, parameter)
        known = layout is not None and parameter.dim() in (2, 3)
        return ParameterKind(target.parameter, layout or "") if known else None

    def way_of(self, target: Target, kind: Kind, settings: Settings) -> Way:
        """Branch, or weight where the user asks for it or something reads the weight uncalled."""
        if settings.how == "weight" or kind.way(target.module) == "weight":
            return "weight"
        if target.module not in self.read:
            self.read[target.module] = self._is_read(target)
        return "weight" if self.read[target.module] else "branch"

    def _is_read(self, target: Target) -> bool:
        """Whether a module above the target reads its weight."""
        for path in target.paths:
            components = path.split(".") if path else []
            for depth in range(len(components)):
                ancestor = self.view.by_path[".".join(components[:depth])]
                if is_read_by(ancestor, ".".join(components[depth:])):
                    return True
        return False

    def site(self, choice: Choice, dtype: torch.dtype | str | None) -> Site:
        """The site of a choice that has not been refused."""
        target, settings = choice.target, self.settings_of(choice.target, choice.pattern)
        module, kind = target.module, self.kind_of(target, settings)
        assert kind is not None
        specs = kind.specs(module, settings)
        weights = {spec.weight: kind.weight(module, spec.weight) for spec in specs}
        first = next(iter(weights.values()))
        return Site(
            paths=target.paths,
            type=target.type,
            module=module,
            kind=kind,
            way=self.way_of(target, kind, settings),
            specs=specs,
            settings=settings,
            dtype=_adapter_dtype(first, dtype, target.path),
            pattern=choice.pattern.label,
            base_elements=_base_elements(weights, specs),
        )

    def followers(self, site: Site) -> list[Site]:
        """The sites of every other place where the weight is registered: all see one adapter.

        Raises:
            UnsupportedLayerError: one of them could not see it.
        """
        name = site.specs[0].weight
        weight = site.module._parameters.get(name)
        if weight is None or len({spec.weight for spec in site.specs}) > 1:
            return []
        return [
            self._follower(site, place, other)
            for place, other in self.view.owners[weight]
            if (place.module, other) != (site.module, name)
            if place.module not in self.limits.excluded
        ]

    def _follower(self, site: Site, place: Place, name: str) -> Site:
        leader = site.specs[0]
        target = Target(place, None if name == "weight" and self.view.kinds[place.module] else name)
        kind = self.kind_of(target, site.settings)
        refusal = "its shape tells no layout" if kind is None else None
        if kind is not None:
            way = self.way_of(target, kind, site.settings)
            refusal = _refusal(place.module, kind, way, site.settings, self.adapter)
        if kind is None or refusal or leader.part or place.module in self.limits.in_full:
            raise UnsupportedLayerError(
                f"its {leader.weight} is tied to {name} of {target.path}, which cannot share the "
                f"adapter: {refusal or 'it is adapted in parts or trains in full'}.",
                path=site.path,
                remedy=f"Exclude {target.path} to leave it with the weight as it was.",
            )
        swapped = kind.transposes != site.kind.transposes
        spec = replace(leader, weight=name, swapped=swapped)
        return replace(
            site,
            paths=target.paths,
            type=target.type,
            module=place.module,
            kind=kind,
            way=way,
            specs=(spec,),
            pattern=f"tied to {site.path}",
            follows=site.path,
        )


def _refusal(
    module: nn.Module, kind: Kind, way: Way, settings: Settings, adapter: str
) -> str | None:
    if reason := kind.refusal(module, way):
        return reason
    for other in adapters_of(module):
        if other.way != way:
            acts = {"branch": "beside its forward", "weight": "in its weight"}
            return (
                f"its adapter {other.name!r} acts {acts[other.way]}, and {adapter!r} would act "
                f"{acts[way]}. Give both the same how=."
            )
    if settings.parts and (way == "weight" or not kind.has_parts):
        return "parts= is for Linear layers in a branch. Leave it out for this one."
    try:
        specs = kind.specs(module, settings)
    except ArgumentError as error:
        return str(error)
    if not specs:
        return "its weights are normed, pruned or otherwise computed. Undo that or exclude it."
    names = [name for spec in specs for name in parameter_names(spec, adapter)]
    new = [] if adapters_of(module) else ["lora_adapters"]
    if reason := general_refusal(module, [*new, *names], way):
        return reason
    if way == "weight" and settings.dropout:
        return (
            f"it is adapted in its weight, where there is no input for dropout={settings.dropout:g}"
            " to act on. Give it dropout 0 by a pattern of its own, or exclude it."
        )
    reasons = (weight_refusal(module, kind.weight(module, s.weight), s, way) for s in specs)
    return next((reason for reason in reasons if reason), None)


def is_adapted(target: Target, adapter: str) -> bool:
    """Whether the target carries this adapter; another parameter of its module may carry it too."""
    own = [a for a in adapters_of(target.module) if a.name == adapter]
    weights = {spec.weight for a in own for spec in a.specs}
    return bool(weights) if target.parameter is None else target.parameter in weights


def _base_elements(weights: Mapping[str, Tensor], specs: Sequence[Spec]) -> int:
    """Elements of the adapted weights; a packed one has as many as its features say."""
    return sum(
        whole_numel(weight)
        if weight.is_floating_point()
        else math.prod(next((s.n_in, s.n_out) for s in specs if s.weight == name))
        for name, weight in weights.items()
    )


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
