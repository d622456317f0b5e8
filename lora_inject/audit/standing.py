"""What can be seen of a model standing still."""

from collections.abc import Iterator

import torch
from torch import nn

from lora_inject.audit.findings import Finding
from lora_inject.audit.subject import Subject
from lora_inject.compat.marks import has_accelerate_hook
from lora_inject.core.company import company
from lora_inject.core.drift import Kind, drift
from lora_inject.core.state_parts import Injection
from lora_inject.files.fingerprint import differs
from lora_inject.own import own_class

_DRIFT: dict[Kind, str] = {
    "gone": "replaced", "came": "came", "thawed": "thawed", "frozen": "frozen",
    "class": "class-changed", "forward": "forward-changed",
}  # fmt: skip


def adapters_there(s: Subject) -> Iterator[Finding]:
    """That there are adapters, and that something trains."""
    if not s.look.adapted:
        yield Finding("no-adapter", "")
    elif not any(parameter.requires_grad for parameter in s.look.parameters):
        yield Finding("nothing-trains", "")


def adapters_asleep(s: Subject) -> Iterator[Finding]:
    """Adapters that train and do not run."""
    asleep: dict[str, str] = {}
    for state in s.look.adapted.values():
        folded = state.merged.adapters if state.merged else ()
        for name in state.on_it & state.use.trains:
            if state.blocks and state.rows is None:
                asleep[name] = "disabled"
            elif name in folded:
                asleep[name] = "merged"
            elif name not in state.use.weights:
                asleep[name] = "not in use"
    yield from (Finding("asleep", name, why) for name, why in asleep.items())


def drifted(s: Subject) -> Iterator[Finding]:
    """Where the model is not what its states say."""
    for each in drift(s.look, *_DRIFT):
        yield Finding(_DRIFT[each.kind], each.path)


def copies_without(s: Subject) -> Iterator[Finding]:
    """Modules like one that was injected, which no call has reached."""
    kinds = {own_class(root): len(s.look.index.below(root)) for root, _ in s.look.calls}
    for module in s.look.index.modules:
        known = module in s.look.states or type(module) not in kinds
        if not known and len(s.look.index.below(module)) == kinds[type(module)]:
            yield Finding("copy-without", s.path(module))


def left_alone(s: Subject) -> Iterator[Finding]:
    """What a pattern would have adapted and inject could not, and nobody has since."""
    adapted = {s.look.target_path(layer, adapter) for layer, adapter in s.look.adapters}
    for root, call in _calls(s):
        for path, reason in call.left.items():
            if s.path(root, path) not in adapted:
                yield Finding("left-alone", s.path(root, path), reason)


def another_base(s: Subject) -> Iterator[Finding]:
    """Weights that are not those that a loaded adapter was made for."""
    for root, call in _calls(s):
        for key, made_for in call.base.items():
            path, _, name = s.path(root, key).rpartition(".")
            layer = s.look.index.by_path.get(path)
            state = None if layer is None else s.look.states.get(layer)
            weight = None if layer is None else layer._parameters.get(name)
            folded = state is not None and state.merged
            if weight is not None and not folded and differs(made_for, weight):
                yield Finding("other-base", s.path(root, key), f"of {call.adapter!r}")


def _calls(s: Subject) -> Iterator[tuple[nn.Module, Injection]]:
    """The calls that put adapters there, with the modules that they were on."""
    return ((root, call) for root, calls in s.look.calls for call in calls)


def missing_beside(s: Subject) -> Iterator[Finding]:
    """Adapters that were trained on top of others that are not here."""
    for name, others in company(s.look).items():
        for other in sorted(others - s.look.known.keys()):
            yield Finding("missing-beside", name, f"on top of {other!r}")


def dead(s: Subject) -> Iterator[Finding]:
    """Pairs of which every factor is multiplied with another one that is zero."""
    for layer, _, pair in s.readable:
        factors = s.factors(layer, pair)
        trains = [role for role, t in factors.items() if t.requires_grad] or [*factors]
        if len(factors) > 1 and all(
            any(s.is_zero(t) for other, t in factors.items() if other != role) for role in trains
        ):
            yield Finding("dead", s.path(layer, pair.spec.prefix.rstrip("_")))


def unmoved(s: Subject) -> Iterator[Finding]:
    """Pairs that are as they began, of an adapter that was trained."""
    known = s.optimizer.state if s.optimizer is not None else {}
    stepped = {id(tensor) for tensor, own in known.items() if own}
    adding = [s.adds(layer, pair) for layer, _, pair in s.readable]
    trained = {each[1].name for each, adds in zip(s.readable, adding, strict=True) if adds}
    for (layer, adapter, pair), adds in zip(s.readable, adding, strict=True):
        own = {id(tensor) for tensor in pair.tensors(layer).values()}
        if not adds and (adapter.name in trained or not stepped.isdisjoint(own)):
            which = repr(adapter.name) if len(s.look.known) > 1 else ""
            yield Finding("unmoved", s.path(layer, pair.spec.prefix.rstrip("_")), which)


def devices(s: Subject) -> Iterator[Finding]:
    """Adapters without values, or on another device than their layer."""
    for layer, _, pair in s.pairs:
        weight = layer._parameters.get(pair.spec.weight)
        for name in pair.names.values():
            tensor = layer.get_parameter(name)
            if has_accelerate_hook(layer):
                continue
            if tensor.is_meta and not (weight is not None and weight.is_meta):
                yield Finding("on-meta", s.path(layer, name))
            elif weight is not None and weight.device != tensor.device:
                yield Finding(
                    "device-apart", s.path(layer, name), f"{tensor.device}, {weight.device}"
                )


def half_precision(s: Subject) -> Iterator[Finding]:
    """What trains in float16."""
    for module, name, parameter in s.trained:
        if parameter.dtype is torch.float16:
            yield Finding("fp16-trains", s.path(module, name))


def stale_gradients(s: Subject) -> Iterator[Finding]:
    """What is frozen and holds a gradient."""
    for parameter in s.look.parameters:
        if parameter.grad is not None and not parameter.requires_grad:
            yield Finding("stale-gradient", s.places[id(parameter)])


def modes(s: Subject) -> Iterator[Finding]:
    """The uppermost parts in training mode of a model in eval mode."""
    if s.look.model.training:
        return
    inside = set[nn.Module]()
    for module in s.look.index.modules:
        if module.training and module not in inside:
            inside.update(s.look.index.below(module))
            yield Finding("part-in-training", s.path(module))
