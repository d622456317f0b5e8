"""What can be seen of a model standing still."""

from collections.abc import Iterator

import torch
from torch import nn

from lora_inject.audit.findings import Finding
from lora_inject.audit.subject import Subject
from lora_inject.compat.marks import has_accelerate_hook
from lora_inject.core.company import company
from lora_inject.core.drift import Kind, drift
from lora_inject.files.fingerprint import differs
from lora_inject.own import own_class

_DRIFT: dict[Kind, str] = {
    "gone": "replaced", "came": "came", "thawed": "thawed", "frozen": "frozen",
    "class": "class-changed", "forward": "forward-changed",
}  # fmt: skip


def adapters_there(s: Subject) -> Iterator[Finding]:
    """That there are adapters, and that something trains."""
    if not s.look.own:
        yield Finding("no-adapter", "")
    elif not any(parameter.requires_grad for parameter in s.look.parameters):
        yield Finding("nothing-trains", "")


def adapters_asleep(s: Subject) -> Iterator[Finding]:
    """Adapters that train and do not run."""
    asleep: dict[str, str] = {}
    for state in s.look.own.values():
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
    roots = [module for module, state in s.look.states.items() if state.reach.roots]
    kinds = {own_class(root): len(s.look.index.below(root)) for root in roots}
    for module in s.look.index.modules:
        known = module in s.look.states or type(module) not in kinds
        if not known and len(s.look.index.below(module)) == kinds[type(module)]:
            yield Finding("copy-without", s.path(module))


def left_alone(s: Subject) -> Iterator[Finding]:
    """What a pattern would have adapted and inject could not."""
    for call in s.look.injections:
        for path, reason in call.left.items():
            yield Finding("left-alone", path, reason)


def another_base(s: Subject) -> Iterator[Finding]:
    """Weights that are not those that a loaded adapter was made for."""
    for root, state in s.look.states.items():
        for call in state.reach.injections if state.reach.roots else ():
            for key, made_for in call.base.items() if call.id in state.reach.roots else ():
                path, _, name = f"{s.path(root)}.{key}".strip(".").rpartition(".")
                layer = s.look.index.by_path.get(path)
                weight = None if layer is None else layer._parameters.get(name)
                merged = layer in s.look.states and s.look.states[layer].merged
                if weight is not None and not merged and differs(made_for, weight):
                    yield Finding("other-base", s.path(root, key), f"of {call.adapter!r}")


def missing_beside(s: Subject) -> Iterator[Finding]:
    """Adapters that were trained on top of others that are not here."""
    for name, others in company(s.look).items():
        for other in sorted(others - s.look.known.keys()):
            yield Finding("missing-beside", name, f"on top of {other!r}")


def dead(s: Subject) -> Iterator[Finding]:
    """Pairs of which every factor is multiplied with another one that is zero."""
    for layer, _, pair in s.pairs:
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
    trained = {adapter.name for layer, adapter, pair in s.pairs if s.adds(layer, pair)}
    for layer, adapter, pair in s.pairs:
        own = pair.tensors(layer).values()
        if (adapter.name in trained or any(id(t) in stepped for t in own)) and not s.adds(
            layer, pair
        ):
            yield Finding(
                "unmoved", s.path(layer, pair.spec.prefix.rstrip("_")), _of(s, adapter.name)
            )


def _of(s: Subject, adapter: str) -> str:
    """Which adapter it is, where there are several."""
    return repr(adapter) if len(s.look.known) > 1 else ""


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
