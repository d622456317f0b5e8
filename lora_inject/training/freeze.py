"""What trains and what stands still: bias modes, modules that train in full, running statistics."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_inject.changes.edits import Edit, run, training_edits
from lora_inject.changes.statistics import has_statistics, holding_edits
from lora_inject.core.adaptation import Adaptation, own_in_place, reached, train_in_full
from lora_inject.core.checks import require_exchangeable, require_one_owner
from lora_inject.core.commit import commit
from lora_inject.core.drift import held_below, warn_of_drift
from lora_inject.core.in_place import in_place
from lora_inject.core.look import Look
from lora_inject.core.matcher import Matcher
from lora_inject.core.patterns import Patterns
from lora_inject.core.request import optional_patterns
from lora_inject.core.state import State
from lora_inject.errors import ArgumentError, UnsupportedLayerError
from lora_inject.own import Place, own_tensor
from lora_inject.report.report import Report, report_of
from lora_inject.settings import BiasMode, check_bias


def freeze(model: nn.Module, bias: BiasMode = "none", train_also: Patterns = ()) -> Report:
    """Leave only A and B, the biases of this mode and ``train_also`` modules trainable.

    Everything else gets ``requires_grad=False`` and loses its ``.grad``, and the running statistics
    of frozen BatchNorm-like layers stand still in training mode too (they still normalise by the
    batch there, as before). ``inject`` has done this already; call it to change the mode later. On
    an injected model ``strip`` undoes it; on any other nothing remembers, as with
    ``requires_grad_(False)``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> report = freeze(model, bias="all")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.bias', '1.bias']

    Args:
        model: any ``nn.Module``.
        bias: "none", "all" (every bias in the model) or "lora_only" (biases of adapted layers).
            Biases that were frozen before stay frozen.
        train_also: patterns for modules that train in full, such as a new head.

    Returns:
        The report of what trains now.

    Raises:
        ArgumentError: an argument cannot be used, or several adapters are in use, of which only one
            could own what trains in place.
        NoMatchError: a ``train_also`` pattern selects nothing that can train.
        UnsupportedLayerError: an adapted layer is to train in full.
        LoRAInjectError: the model is part of one that was adapted as a whole.
    """
    bias = check_bias(bias)
    look = Look(model)
    patterns = optional_patterns(train_also, "train_also")
    in_full = Matcher(look).trainable_modules("train_also", patterns)
    tops = list(in_full.values())
    states = look.states
    if any(m in states and states[m].adapters for top in tops for m in look.index.below(top)):
        raise UnsupportedLayerError("train_also: an adapted layer cannot train in full.")
    look.require_whole(look.known)
    look.require_awake()

    used = look.used
    layers = [m for m, s in look.adapted.items() if any(a.name in used for a in s.adapters)]
    tensors = in_place(look, layers, bias, tops)
    if look.states and tensors and not _is_one_in_use(look):
        raise ArgumentError(
            f"{len(used)} adapters are in use, or parts use one differently, and what trains in "
            "place belongs to one, with a weight of 1.",
            remedy='Name that one first: use(model, "default").',
        )
    require_one_owner(look, tensors)
    if look.states:
        require_exchangeable(look, tensors)
    warn_of_drift(look, "gone", "class")

    def shown() -> Report:
        return report_of(look.again())

    if not look.states:
        return run(_plain_edits(look, tensors, tops), shown)  # type: ignore[no-any-return]
    made = Adaptation(_frozen(look, bias, in_full))
    for name in used:
        own_in_place(look, made, name, tensors, joins=True)
        train_in_full(look, made.states, name, tops)
    for module, state in made.states.items():
        if state.is_adapted:
            had = look.adapted[module].on_it if module in look.adapted else set()
            new = {name: 1.0 for name in used if name in state.on_it - had}
            use = state.use._replace(weights={**state.use.weights, **new}, trains=frozenset(used))
            made.states[module] = state.change(use=use)
    return commit(look, made.states, fresh=made.fresh, flags="all", then=shown)  # type: ignore[no-any-return]


def freeze_adapter(model: nn.Module, name: str) -> None:
    """Let an adapter train no more; it stays in use where it is, and all else stays as it is."""
    look = Look(model)
    states = {
        module: state.change(use=state.use._replace(trains=state.use.trains - {name}))
        for module, state in look.adapted.items()
        if name in state.use.trains
    }
    commit(look, states)


def _is_one_in_use(look: Look) -> bool:
    """Whether one adapter is in use, with a weight of 1 wherever it has something."""
    on_it = [s.use.weights for s in look.adapted.values() if look.used.keys() & s.on_it]
    return len(look.used) == 1 and all(list(weights.values()) == [1.0] for weights in on_it)


mark_only_lora_as_trainable = freeze  # loralib's name


def _frozen(look: Look, bias: BiasMode, in_full: Collection[str]) -> dict[nn.Module, State]:
    """The states of a model of which the adapters in use have this bias mode and own nothing yet.

    What they owned waits with them and trains no more; modules that were added since are reached,
    and what is gone is missed no more.
    """
    used = look.used.keys()
    states = reached(look)
    layers, _ = held_below(look, look.model)
    own = look.states[look.model].reach.roots if look.model in look.states else frozenset()
    calls = {
        call.id: replace(
            call,
            bias=bias if call.adapter in used else call.bias,
            # Of a call on a part, which ends with it, the whole does not know what is missing.
            layers=call.layers & layers.get(call.adapter, set()) if call.id in own else frozenset(),
            in_full=frozenset(in_full) if call.adapter in used else call.in_full,
        )
        for call in look.injections
    }
    for module, state in states.items():
        reach = state.reach
        reach = reach._replace(
            # What was called on parts is one call on the whole now, and goes with it.
            injections=tuple(calls.values()),
            roots=look.roots if module is look.model else frozenset(),
            in_full=tuple(name for name in reach.in_full if name not in used),
            tops=tuple(name for name in reach.tops if name not in used),
        )
        trained = tuple(
            replace(t, owners={n: trains and n not in used for n, trains in t.owners.items()})
            for t in state.trained
        )
        states[module] = state.change(reach=reach, trained=trained)
    return states


def _plain_edits(
    look: Look, tensors: Mapping[Place, bool], in_full: Sequence[nn.Module]
) -> list[Edit]:
    """The same for a model without adapters, of which nothing is remembered."""
    trainable = {id(own_tensor(*place)) for place, trains in tensors.items() if trains}
    moving = {module for top in in_full for module in look.index.below(top)}
    edits = [e for p in look.parameters for e in training_edits(p, id(p) in trainable)]
    for module in look.index.modules:
        if has_statistics(module):
            edits += holding_edits(module, module not in moving)
    return edits
