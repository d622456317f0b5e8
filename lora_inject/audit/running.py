"""What one forward and backward pass shows."""

import math
from collections.abc import Iterator

from torch import Tensor, nn

from lora_inject.audit.findings import Finding
from lora_inject.audit.subject import Subject, numbers
from lora_inject.changes.checkpointing import is_needed_early
from lora_inject.compat.marks import has_accelerate_hook, is_fully_sharded
from lora_inject.core.adapter import Adapter
from lora_inject.core.look import Look
from lora_inject.variants import Rows

LARGE = 1.0  # ||delta|| / ||y|| above which an update is out of proportion


def loss(s: Subject) -> Iterator[Finding]:
    """What the loss depends on."""
    if not s.ran.has_graph:
        yield Finding("loss-detached", "")
    elif s.ran.seen.nodes and s.ran.reached.isdisjoint(s.ran.seen.nodes):
        yield Finding("loss-apart", "")


def not_finite(s: Subject) -> Iterator[Finding]:
    """Where NaN or infinity comes from, where the loss or a gradient has one."""
    if not s.ran.is_finite:
        first = [*first_not_finite(s.look, s.ran.seen.flags)]
        yield from first or [Finding("not-finite", "", "in the loss alone")]
        return
    for parameter, most in s.ran.gradients.items():
        if not math.isfinite(most):
            yield Finding("gradient-not-finite", s.places[id(parameter)])


def first_not_finite(look: Look, flags: list[tuple[nn.Module, Tensor]]) -> Iterator[Finding]:
    """The module in whose output NaN or infinity came up first, if there is one."""
    fine = numbers(flag for _, flag in flags)
    for (module, _), ok in zip(flags, fine, strict=True):
        if not ok:
            yield Finding("not-finite", look.index.path(module))
            return


def layers_that_ran(s: Subject) -> Iterator[Finding]:
    """Layers that were not called, or without a graph, or whose adapters got no gradient."""
    for layer, adapter in s.look.adapters:
        state, runs = s.look.states[layer], s.ran.seen.runs[layer]
        if adapter.name not in {term.adapter for term in state.running}:
            continue
        trains, came = _gradients(s, layer, adapter)
        path = s.path(layer)
        if layer in s.ran.seen.compiled:
            if trains and not came and s.ran.has_graph:
                yield Finding("compiled-without", path)
        elif not runs.calls:
            elsewhere = any(reads is layer for reads, _ in s.ran.seen.outside)  # said as such
            if not came and not elsewhere and (trains or adapter.way == "branch"):
                yield Finding("never-ran", path)
        elif trains and not came and len(runs.used) < 2:
            if runs.without_graph == runs.calls:
                yield Finding("checkpoint-cut" if runs.checkpointed else "under-no-grad", path)
            elif not runs.nodes or not s.ran.reached.isdisjoint(runs.nodes):
                yield Finding("bypassed", path)
            elif s.ran.has_graph:
                yield Finding("no-gradient", path)


def _gradients(s: Subject, layer: nn.Module, adapter: Adapter) -> tuple[bool, bool]:
    """Whether something of an adapter trains, and whether a gradient of it came."""
    own = [layer._parameters.get(name) for name in adapter.parameters]
    trains = [p for p in own if p is not None and p.requires_grad]
    return bool(trains), any(p in s.ran.gradients for p in trains)


def in_place(s: Subject) -> Iterator[Finding]:
    """What trains in place and got no gradient."""
    for module, trained in s.look.trained:
        parameter = module._parameters.get(trained.name)
        is_in_use = s.look.states[module].holder(trained) in trained.owners
        if parameter is None or not parameter.requires_grad or not is_in_use:
            continue
        if parameter not in s.ran.gradients and s.ran.has_graph:
            yield Finding("no-gradient", s.path(module, trained.name))


def zero_gradients(s: Subject) -> Iterator[Finding]:
    """Gradients that are zero although everything that they are multiplied with is not.

    Not those of rows of a table, of which a batch may have none.
    """
    for layer, adapter, pair in s.readable:
        if isinstance(adapter.settings.variant, Rows):
            continue
        factors = s.factors(layer, pair)
        for role, tensor in factors.items():
            others = [t for other, t in factors.items() if other != role]
            if s.ran.gradients.get(tensor) == 0 and not any(map(s.is_zero, others)):
                yield Finding("zero-gradient", s.path(layer, pair.names[role]))


def weights(s: Subject) -> Iterator[Finding]:
    """Weights that were used elsewhere, or were others."""
    seen = s.ran.seen
    for layer, reader in seen.outside:
        yield Finding("read-outside", s.path(layer), f"by {s.path(reader) or 'the model'}")
    for layer, reader in seen.tied:
        yield Finding("tied-apart", s.path(layer), f"with {s.path(reader)}")
    for layer, runs in seen.runs.items():
        swaps = is_fully_sharded(layer) or has_accelerate_hook(layer)  # shards, or what is on meta
        if runs.other_weight and not swaps:
            yield Finding("other-weight", s.path(layer))
        if len(runs.used) > 1:
            names = sorted({" + ".join(dict(used)) or "none" for used in runs.used})
            yield Finding("adapters-changed", s.path(layer), ", ".join(names))


def sizes(s: Subject) -> Iterator[Finding]:
    """Updates beside the output of their layer, and directions that A makes."""
    for layer, runs in s.ran.seen.runs.items():
        ratio, state = runs.sizes.ratio, s.look.states[layer]
        if ratio is not None and ratio > LARGE:
            yield Finding("update-large", s.path(layer), f"{ratio:.2g} times")
        if ratio == 0 and _should_add(s, layer):
            yield Finding("update-lost", s.path(layer))
        ranks = {adapter.name: adapter.settings.r for adapter in state.adapters}
        for name, (used, most) in runs.sizes.ranks.items():
            if 0 < used < most:
                yield Finding("rank-unused", s.path(layer), f"{used} of {ranks[name]}")


def _should_add(s: Subject, layer: nn.Module) -> bool:
    """Whether an adapter in use of the layer adds something to any input."""
    running = s.look.states[layer].running
    sure = [t for t in running if not (isinstance(t.variant, Rows) or (t.drops and layer.training))]
    names = {term.adapter for term in sure}
    pairs = [(a, pair) for module, a, pair in s.readable if module is layer]
    return any(adapter.name in names and s.adds(layer, pair) for adapter, pair in pairs)


def what_moved(s: Subject) -> Iterator[Finding]:
    """Buffers and parameters that the forward pass has written to."""
    moved, written = set(map(id, s.ran.moved)), set(map(id, s.ran.written))
    for module, state in s.look.states.items():
        known = {trained.name for trained in state.trained} | module._non_persistent_buffers_set
        for name, buffer in module._buffers.items() if not state.statistics_move() else ():
            if id(buffer) in moved and name not in known:
                yield Finding("statistics-move", s.path(module, name))
    yield from (Finding("parameter-written", s.places[key]) for key in written if key in s.places)


def dropouts(s: Subject) -> Iterator[Finding]:
    """Dropout as in training, in modules in eval mode."""
    yield from (Finding("dropout-in-eval", s.path(module)) for module in s.ran.seen.dropouts)


def early_graph(s: Subject) -> Iterator[Finding]:
    """Modules that ran with a graph before the first one that trains."""
    seen = s.ran.seen
    if not seen.early or any(is_needed_early(module) for module in s.look.index.modules):
        return
    whole = sum(seen.elements.values()) or 1
    share = sum(seen.elements[module] for module in seen.early) / whole
    detail = f"{share:.1%} of the weights that run"
    yield Finding("graph-early", s.path(next(iter(seen.early))), detail)
