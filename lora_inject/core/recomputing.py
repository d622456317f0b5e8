"""What ran is what is recomputed: checkpointed parts of a model run again with what they ran with.

A part that is checkpointed is computed again in the backward pass, when another adapter may be in
use, or a block has been left. So the first adapted layer that runs in such a part leaves word with
it of the moment: the part is then computed again with everything as it was, or refused where that
is not possible. A commit ends a moment and says what it changed; moments refer to later ones alone,
and each is gone when no part needs it any more.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_inject.changes.edits import Edit, run, surely, undo
from lora_inject.compat.torch_private import checkpointed_parts, may_be_checkpointed
from lora_inject.core.facts import Facts
from lora_inject.core.state import State, States, path_of, state_of
from lora_inject.errors import LoRAInjectError

_REMEDY = "Call backward before that, or do without gradient checkpointing here."
_one_at_a_time = threading.RLock()  # devices have threads of their own in a backward pass

# What makes modules what these states say, as they are now.
ToEdits = Callable[[States], list[Edit]]


class Moment:
    """The time between two commits.

    Attributes:
        facts: the model as it was looked at by the commit that ended the moment.
        changed: the modules that it changed.
        edits: what gives modules of that model other states.
        next: the moment that follows.
    """

    __slots__ = ("changed", "edits", "facts", "next")

    facts: Facts
    changed: States
    edits: ToEdits
    next: "Moment"


class _Times(threading.local):
    """The moment that a thread shows, while it computes a part as it was."""

    shown: Moment | None = None


_times = _Times()
_now = [Moment()]


def note_commit(facts: Facts, changed: States, edits: ToEdits) -> None:
    """End the moment, after a commit."""
    if _times.shown is None:  # and what a part changes while it runs again is no news
        moment, _now[0] = _now[0], Moment()
        moment.facts, moment.changed, moment.edits = facts, changed, edits
        moment.next = _now[0]


def note_parts() -> None:
    """Leave word with the parts that run now, before a commit changes something in their middle."""
    for part in checkpointed_parts():
        if not part.runs_again:
            _with_word(part)


def note_run(layer: nn.Module) -> None:
    """Leave word with the checkpointed parts that an adapted layer runs in.

    Called by every adapted layer in its forward, so that it has to be fast elsewhere.

    Raises:
        LoRAInjectError: they run again, and the layer ran without its adapters before.
    """
    # In the reentrant form the first pass has no gradients, and what a model computes without them
    # in eval mode is not to wait for a walk of the stack.
    if may_be_checkpointed() if torch.is_grad_enabled() else layer.training:
        for part in checkpointed_parts():
            word = _with_word(part)
            if layer in word.layers:
                return
            if part.runs_again:
                if layer.training:
                    raise LoRAInjectError(
                        "an adapter runs in it now, in the backward pass, and none did when it was "
                        "computed first.",
                        path=path_of(layer),
                        remedy=_REMEDY,
                    )
                return
            word.layers.add(layer)


def _with_word(part: Any) -> "_AsItRan":
    """What a part calls to run again, which knows when it ran first."""
    if not isinstance(part.function, _AsItRan):
        part.function = _AsItRan(part.function, _times.shown or _now[0])
    return part.function


class _AsItRan:
    """A function that runs again as it ran at a moment.

    Args:
        function: what is called.
        moment: the moment.
    """

    def __init__(self, function: Callable[..., Any], moment: Moment) -> None:
        self.function, self.moment = function, moment
        self.layers: set[nn.Module] = set()  # the adapted ones that ran in it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _one_at_a_time, self._shown():
            return self.function(*args, **kwargs)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Show the moment."""
        former, done = _times.shown, list[Edit]()
        try:
            for then, edits in self._differences():
                made = edits(then)
                done += made
                run(made)
            _times.shown = self.moment if done else former
            yield
        finally:
            _times.shown = former
            surely(lambda: undo(done))

    def _differences(self) -> list[tuple[States, ToEdits]]:
        """The states that modules had then, where something else runs now, by the later commits."""
        seen, found, moment = set[nn.Module](), list[tuple[States, ToEdits]](), self.moment
        while moment is not _now[0]:
            if not self.layers.isdisjoint(moment.facts.index.paths):
                before, then = moment.facts.states, dict[nn.Module, State | None]()
                for module in moment.changed:
                    if module not in seen:
                        seen.add(module)
                        old, now = before.get(module), state_of(module)
                        if old is not now and _what_runs(old) != _what_runs(now):
                            _require_alike(moment.facts, module, old, now)
                            then[module] = old
                if then:
                    found.append((then, moment.edits))
            moment = moment.next
        return found


def _what_runs(state: State | None) -> Any:
    """All by which a state decides what its module computes."""
    if state is None or not state.is_adapted:
        return None
    holders = {trained.name: state.holder(trained) for trained in state.trained}
    merged = state.merged.adapters if state.merged and not state.blocks else None
    return state.running, id(state.rows), holders, merged


def _require_alike(facts: Facts, module: nn.Module, old: State | None, now: State | None) -> None:
    """Refuse to show a state whose tensors are not there."""
    if old and now and old.adapters == now.adapters and not (old.merged or now.merged):
        owners = [[(t.name, t.owners, t.original) for t in s.trained] for s in (old, now)]
        if owners[0] == owners[1]:
            return
    raise LoRAInjectError(
        "its adapters were put on, taken off or merged between the forward pass and the backward "
        "pass, which computes it again.",
        path=facts.index.path(module),
        remedy=_REMEDY,
    )
