"""``monitor``: the first steps of a run, watched in whatever loop makes them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_inject.audit.audit import result_of
from lora_inject.audit.findings import Audit, Finding, in_order
from lora_inject.audit.observing import Hook, Seen, hooked
from lora_inject.audit.running import first_not_finite, sizes
from lora_inject.audit.subject import Ran, Subject
from lora_inject.core.look import Look
from lora_inject.errors import warn
from lora_inject.printing import plural
from lora_inject.settings import check_count


def monitor(model: nn.Module, steps: int = 20) -> "Monitor":
    """Watch the first steps of a run, say what goes wrong, and go.

    A step is one of an optimizer that has something of the adapters. NaN or infinity is told at
    once, as a ``LoRAInjectWarning`` with the module in which it came up first. After the last step
    adapters are named whose B has not moved, and updates out of proportion to their layer's output;
    then every hook is taken off. A forward pass waits for nothing; a step reads one number for each
    module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2)
        >>> watch, optimizer = monitor(model, steps=2), torch.optim.Adam(lora_parameters(model))
        >>> for _ in range(2):
        ...     model(torch.randn(3, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> print(watch.result)
        Audit of Sequential (1 adapted layer), in 2 steps: nothing found.

    Args:
        model: an adapted model.
        steps: how many steps are watched.

    Returns:
        The monitor: ``result`` is what was found, once it is over, and ``stop()`` ends it early.

    Raises:
        ArgumentError: ``steps`` is no number of steps.
        LoRAInjectError: the model has no adapters.
    """
    look = Look(model)
    look.require_adapters()
    return Monitor(look, check_count(steps, "steps"))


class Monitor:
    """What ``monitor`` returns.

    Attributes:
        result: what was found; None while the steps are not over.
    """

    def __init__(self, look: Look, steps: int) -> None:
        self.result: Audit | None = None
        self._look, self._steps, self._done = look, steps, 0
        self._found: list[Finding] = []
        self._optimizer: Any = None  # the first one that has something of the adapters
        self._trained = {id(parameter) for _, _, parameter in Subject(look).trained}
        self._begun = _values(look)
        self._seen = Seen(look, measures=steps == 1, keeps_graph=False)
        self._handles = [
            look.model.register_forward_pre_hook(Hook(self._begin)),
            *hooked(self._seen),
            register_optimizer_step_post_hook(self._stepped),
        ]
        self._seen.forward = True

    def stop(self) -> None:
        """End it now, with what was seen so far."""
        if self.result is not None:
            return
        for handle in self._handles:
            handle.remove()
        self._read_flags()
        found = [*self._found, *(self._of_steps() if self._done else ())]
        self.result = result_of(self._look, f"in {plural(self._done, 'step')}", in_order(found))
        self._begun = {}
        if any(each.severity != "note" for each in found[len(self._found) :]):  # not told yet
            warn(str(self.result))

    def _stepped(self, optimizer: Any, _: Any, __: Any) -> None:
        if self._optimizer is None:
            held = (id(p) for group in optimizer.param_groups for p in group["params"])
            self._optimizer = optimizer if not self._trained.isdisjoint(held) else None
        if self._optimizer is not optimizer:
            return
        self._read_flags()
        self._done += 1
        self._seen.measures = self._done == self._steps - 1
        if self._done == self._steps:
            self.stop()

    def _begin(self, *_: Any) -> None:
        """Read what is left of a forward pass before, after which no step came."""
        self._read_flags()

    def _read_flags(self) -> None:
        """Say where NaN or infinity came up first, once."""
        seen = self._seen
        if seen.flags and not self._found:
            for found in first_not_finite(self._look, seen.flags):
                finding = found._replace(detail=f"in step {self._done + 1}")
                self._found.append(finding)
                warn(f"{finding.path or 'the model'}: {finding.meaning} {finding.remedy}")
        seen.flags = []

    def _of_steps(self) -> Iterator[Finding]:
        look = self._look.again()
        ran = Ran(self._seen, True, True, set(), {}, (), ())
        yield from sizes(Subject(look, None, ran))
        now = _values(look)
        for path, B in self._begun.items():
            if path in now and torch.equal(B, now[path]):
                yield Finding("unmoved", path)


def _values(look: Look) -> dict[str, Tensor]:
    """Copies of what has to move in each pair that trains and runs, by its path.

    That is the factor that begins at zero, so that others get gradients from its first step on; or
    where there is none, the first one that trains.
    """
    found = {}
    subject = Subject(look)
    for layer, adapter, pair in subject.pairs:
        factors = subject.factors(layer, pair).items()
        trains = {role: t for role, t in factors if t.requires_grad}
        if trains and adapter.name in look.states[layer].use.weights:
            role = adapter.kind.zero if adapter.kind.zero in trains else next(iter(trains))
            found[subject.path(layer, pair.names[role])] = trains[role].detach().clone()
    return found
