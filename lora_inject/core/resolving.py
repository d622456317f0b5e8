"""From a selected target to a site: its kind, way and pairs, or why it cannot be adapted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_inject.core.adapter import dropouts_of, names_of
from lora_inject.core.checks import require_finite
from lora_inject.core.class_swap import class_refusal
from lora_inject.core.matcher import Exclusions, Matcher, Target
from lora_inject.core.parts import parts_by_module
from lora_inject.core.patterns import NamedModule, Pattern
from lora_inject.core.reads import Reads
from lora_inject.core.request import Request
from lora_inject.core.site import Refusal, Site
from lora_inject.core.state import adapters_of
from lora_inject.errors import AlreadyAdaptedError, ArgumentError, UnsupportedLayerError
from lora_inject.kinds import Kind, Spec
from lora_inject.kinds.base import Way, is_packed
from lora_inject.kinds.parameter import ParameterKind, layout_of
from lora_inject.kinds.refusals import general_refusal, lazy_refusal, weight_refusal
from lora_inject.own import Place, own_class
from lora_inject.settings import Settings
from lora_inject.sharding import is_distributed, is_placeholder, whole_numel
from lora_inject.starts import Start


class Resolver:
    """What turns a selected target into a site, or says why it cannot be one.

    Args:
        matcher: the model.
        request: what was asked for.
        exclusions: what is not to be adapted.
    """

    def __init__(self, matcher: Matcher, request: Request, exclusions: Exclusions) -> None:
        self.matcher, self.request, self.exclusions = matcher, request, exclusions
        self.parts = parts_by_module(matcher, request.parts)
        self.reads = Reads(matcher.look.index)

    def resolve(self, target: Target, pattern: Pattern) -> Site | Refusal:
        """The site that the target is for this pattern, or why it cannot be one.

        Raises:
            AlreadyAdaptedError: it carries an adapter of this name.
        """
        if lazy := lazy_refusal(target.module):
            return Refusal(lazy)
        module, settings = target.module, self._settings(target, pattern)
        if module in self.exclusions.in_full:
            return Refusal(
                "it is to be adapted and to train in full. Exclude it, or take it out of "
                "train_also."
            )
        if target.parameter is not None and is_placeholder(target.tensor):
            return Refusal(
                "ZeRO-3 has partitioned it. Inject before deepspeed.zero.Init, or exclude it."
            )
        kind = self._kind(target, settings)
        if kind is None:
            return Refusal(
                "it has three dimensions, and nothing tells which order they have. Say "
                'layout="out_in" for (E, out, in) or layout="in_out" for (E, in, out).'
                if target.tensor.dim() == 3
                else "only parameters of two or three dimensions can be adapted. Exclude it."
            )
        if _is_adapted(target, self.request.adapter):
            raise AlreadyAdaptedError(
                f"it already carries the adapter {self.request.adapter!r}.",
                path=target.path,
                remedy="Name the new one by adapter=, exclude the layer, or remove the old one.",
            )
        if writer := self.reads.writer(target):
            return Refusal(
                f"{writer} writes to its weight while it runs, and an adapter would not follow. "
                "Exclude it, or switch that off before (RWKV: model.config.rescale_every = 0)."
            )
        return self._site(target, kind, settings, pattern.label)

    def _settings(self, target: Target, pattern: Pattern) -> Settings:
        """The pattern's settings with the layer's parts, and its start."""
        settings, parts = self.request.settings[pattern], self.parts.get(target.module, ())
        start = settings.start.at(target.path)
        if parts or start is not settings.start:
            settings = replace(settings, parts=parts, start=start)
        return settings

    def _kind(self, target: Target, settings: Settings) -> Kind | None:
        """The kind of a module; for a parameter one with its layout, where that is known."""
        if target.parameter is None:
            return self.matcher.kind(target.module)
        parameter = target.tensor
        layout = settings.layout or layout_of(target.module, parameter)
        known = layout is not None and parameter.dim() in (2, 3)
        return ParameterKind(target.parameter, layout or "") if known else None

    def _way(self, target: Target, kind: Kind, settings: Settings) -> Way:
        """Branch, or weight where that is asked for or done already, or something reads it."""
        others = (adapter.way for adapter in adapters_of(target.module))
        ways = settings.how, settings.variant.way, kind.way(target.module), *others
        if "weight" in ways:
            return "weight"
        return "weight" if self.reads.is_read(target) else "branch"

    def _site(self, target: Target, kind: Kind, settings: Settings, label: str) -> Site | Refusal:
        """The site of a target of which kind and settings are known."""
        module, way = target.module, self._way(target, kind, settings)
        can_go = self.request.dropout_can_go and settings.dropout
        if can_go and not _has_input(module, kind, way, settings):
            settings = replace(settings, dropout=0.0)
        specs = _specs(module, kind, way, settings, self.request.adapter)
        if isinstance(specs, Refusal):
            return specs
        weights = {spec.weight: kind.weight(module, spec.weight) for spec in specs}
        first = next(iter(weights.values()))
        if is_packed(first):
            settings = replace(settings, variant=settings.variant.packed())
        dtype = _adapter_dtype(first, self.request.dtype, target.path)
        require_finite(settings, first.dtype, target.path)
        return Site(
            paths=target.paths,
            type=target.type,
            module=module,
            kind=kind,
            way=way,
            specs=specs,
            settings=settings,
            dtype=dtype,
            pattern=label,
            base_elements=_base_elements(weights, specs),
        )

    def other_places(self, site: Site) -> list[Place]:
        """Every other place where a weight of the site is registered: all see one adapter.

        Raises:
            UnsupportedLayerError: the site has several weights, which share no adapter.
        """
        look, own = self.matcher.look, site.module._parameters
        names = dict.fromkeys(spec.weight for spec in site.specs)
        others = [
            (module, other)
            for name in names
            for module, other in look.tensor_places.get(id(own.get(name)), ())
            if (module, other) != (site.module, name) and other in module._parameters
            if module not in self.exclusions.excluded
        ]
        if others and len(names) > 1:
            raise UnsupportedLayerError(
                f"one of its weights is {look.index.path(*others[0])} too, and a layer of several "
                "weights shares no adapter.",
                path=site.path,
                remedy="Exclude one of the two, to leave it with the weight as it was.",
            )
        return others

    def follower(self, site: Site, module: nn.Module, name: str) -> Site:
        """The site of another place of the weight, which shares the adapter.

        Raises:
            UnsupportedLayerError: it could not see it.
        """
        named = NamedModule(module, self.matcher.look.index.paths[module])
        leader = site.specs[0]
        target = Target(named, None if name == "weight" and self.matcher.kind(module) else name)
        kind = self._kind(target, site.settings)
        own: Site | Refusal = Refusal("its shape tells no layout")
        if kind is not None:
            own = self._site(target, kind, site.settings, f"tied to {site.path}")
        if isinstance(own, Refusal) or leader.part or module in self.exclusions.in_full:
            reason = own.reason if isinstance(own, Refusal) else ""
            raise UnsupportedLayerError(
                f"its {leader.weight} is tied to {name} of {target.path}, which cannot share the "
                f"adapter: {reason or 'it is adapted in parts or trains in full'}.",
                path=site.path,
                remedy=f"Exclude {target.path} to leave it with the weight as it was.",
            )
        swapped = own.kind.transposes != site.kind.transposes
        spec = replace(leader, weight=name, swapped=swapped)
        if wrong := site.settings.variant.refusal(
            own.kind, module, spec, own.way == "branch", site.settings.dropout
        ):
            raise UnsupportedLayerError(
                f"its {leader.weight} is tied to {name} of {target.path}: {wrong}",
                path=site.path,
            )
        return replace(own, specs=(spec,), follows=site.path)


def _specs(
    module: nn.Module, kind: Kind, way: Way, settings: Settings, adapter: str
) -> tuple[Spec, ...] | Refusal:
    """The pairs that a module gets, or why it can have none."""
    if reason := class_refusal(own_class(module)) or kind.refusal(module, way):
        return Refusal(reason)
    others = adapters_of(module)
    for other in others:
        if other.way != way:
            acts = {"branch": "beside its forward", "weight": "in its weight"}
            return Refusal(
                f"its adapter {other.name!r} acts {acts[other.way]}, and {adapter!r} would act "
                f"{acts[way]}. Give both the same how=."
            )
    if settings.parts and (way == "weight" or not kind.has_parts):
        return Refusal("parts= is for Linear layers in a branch. Leave it out for this one.")
    try:
        specs = tuple(settings.variant.spec(kind, spec) for spec in kind.specs(module, settings))
    except ArgumentError as error:
        return Refusal(str(error))
    if not specs:
        return Refusal(
            "its weights are normed, pruned or otherwise computed. Undo that or exclude it."
        )
    names = [*names_of(specs, adapter, settings.variant)[1]]
    names += dropouts_of(specs[0], adapter, settings)
    if reason := general_refusal(module, names if others else ["lora_adapters", *names], way):
        return Refusal(reason)
    if settings.dropout and not _has_input(module, kind, way, settings):
        return Refusal(
            f"it is adapted in its weight, where there is no input for dropout={settings.dropout:g}"
            " to act on. Give it dropout 0 by a pattern of its own, or exclude it."
        )
    if way == "weight" and any(settings.drops):
        return Refusal(
            "it is adapted in its weight, where there is no call to leave ranks or all of it out "
            "of. Give it no rank or module dropout by a pattern of its own, or exclude it."
        )
    for spec in specs:
        weight = kind.weight(module, spec.weight)
        if wrong := weight_refusal(module, weight, spec, way) or _method_refusal(
            module, kind, weight, spec, way, settings
        ):
            return Refusal(wrong)
    return specs


def _has_input(module: nn.Module, kind: Kind, way: Way, settings: Settings) -> bool:
    """Whether an adapter sees what its layer multiplies, on which dropout acts."""
    return way == "branch" or (
        kind.drops_in_products
        and kind.multiplies(module, kind.specs(module, settings), settings.variant)
    )


def _method_refusal(
    module: nn.Module, kind: Kind, weight: Tensor, spec: Spec, way: Way, settings: Settings
) -> str | None:
    """Why a weight cannot have the variant and the start that were asked for."""
    variant, start = settings.variant, settings.start
    if variant.own_shapes and (variant.fixed or start.name != Start.name):
        return (
            f"variant={variant.name!r} is no B A, which another start or a fixed factor could be "
            "of. Leave out init= and fixed=."
        )
    if variant.more or start.reads:
        method = variant.argument if variant.more else f"init={start.name!r}"
        if is_distributed(weight) or is_placeholder(weight):
            return f"{method} needs its whole weight, which is sharded. Inject before that."
        if not is_packed(weight) and weight is not module._parameters.get(spec.weight):
            return f"{method} needs the values of its weight, which is computed. Exclude it."
    return variant.refusal(kind, module, spec, way == "branch", settings.dropout) or start.refusal(
        kind, module, spec
    )


def _is_adapted(target: Target, adapter: str) -> bool:
    """Whether the target carries this adapter; another parameter of its module may carry it too."""
    own = (a for a in adapters_of(target.module) if a.name == adapter)
    weights = [spec.weight for a in own for spec in a.specs]
    return bool(weights) if target.parameter is None else target.parameter in weights


def _base_elements(weights: Mapping[str, Tensor], specs: Sequence[Spec]) -> int:
    """Elements of the adapted weights; a packed one has as many as its features say."""
    elements = 0
    for name, weight in weights.items():
        if weight.is_floating_point():
            elements += whole_numel(weight)
        else:
            elements += math.prod(next((s.n_in, s.n_out) for s in specs if s.weight == name))
    return elements


def _adapter_dtype(weight: Tensor, dtype: torch.dtype | str | None, path: str) -> torch.dtype:
    """float32 over a 16-bit or quantized base, else the base's, unless the user says otherwise."""
    if isinstance(dtype, torch.dtype):
        return dtype
    own = weight.dtype
    size = own.itemsize if own.is_floating_point else 0
    if dtype == "base" and size < 2:
        raise ArgumentError(
            f'dtype="base": the base weight is {own}, in which nothing can train.',
            path=path,
            remedy="Name a dtype, such as torch.bfloat16.",
        )
    return own if dtype == "base" or size > 2 else torch.float32
