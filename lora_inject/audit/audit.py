"""``audit``: one forward and backward pass on a live model, and what it shows."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.audit.checks import OPTIMIZED, RUNNING, STANDING, found_by
from lora_inject.audit.findings import Audit, Finding
from lora_inject.audit.measuring import tensors_in
from lora_inject.audit.observing import Seen, watching
from lora_inject.audit.restoring import Kept, restoring
from lora_inject.audit.subject import Ran, Subject, numbers
from lora_inject.calibration.calibrate import called
from lora_inject.compat.torch_private import tree_map
from lora_inject.core.look import Look
from lora_inject.core.unreached import nodes_behind
from lora_inject.errors import ArgumentError, LoRAInjectWarning
from lora_inject.sharding import whole

Loss = Callable[[Any, Any], Tensor]


def audit(
    model: nn.Module,
    batch: Any = None,
    *,
    loss: Loss | None = None,
    optimizer: Any = None,
    strict: bool = False,
) -> Audit:
    """Find out whether a model really trains what it was given.

    With a batch it runs once forward and once backward, in the modes that it is in, after which
    everything is as it was: random numbers, gradients, flags, buffers, statistics, modes and hooks.
    That computes less than two steps of training; of a toy, where Python is most of the time, it
    takes four or five. Without one, it is looked at as it stands.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = inject(model, "0", r=2)
        >>> print(audit(model, torch.randn(3, 4)))
        Audit of Sequential (1 adapted layer), on one batch: nothing found.
        >>> _ = model[1].requires_grad_(True)
        >>> audit(model).codes
        ('thawed',)

    Args:
        model: any ``nn.Module``.
        batch: what the forward reads: a mapping of its arguments, a tuple of them, or a tensor, on
            the model's device; None for what can be seen without running it.
        loss: a function of what the model returned and the batch; None for the output's ``loss``,
            or where it has none for a mean of all that it returns, weighted, as a plain mean of
            what a norm returns has no gradient.
        optimizer: what is to train the model, to be compared with it.
        strict: raise where there is more than notes.

    Returns:
        The findings, the worst first, which ``print`` shows as a table; the page ``audit_codes`` of
        the guide lists all that there can be.

    Raises:
        ArgumentError: ``loss`` returned no number, or was given without a batch.
        LoRAInjectError: with ``strict``, something is wrong.
    """
    if loss is not None and batch is None:
        raise ArgumentError("loss is for a batch.")
    result = audited(model, batch, partial(called, model), loss, optimizer)
    if strict:
        result.require_sound()
    return result


def audited(
    model: nn.Module, batch: Any, call: Callable[[Any], Any], loss: Loss | None, optimizer: Any
) -> Audit:
    """``audit`` of a model that is called with a batch in a way of its own."""
    look = Look(model)
    ran = None if batch is None else _run(look, batch, call, loss)
    checks = STANDING + (OPTIMIZED if optimizer is not None else ())
    checks += RUNNING if ran is not None else ()
    found = found_by(checks, Subject(look, optimizer, ran))
    return result_of(look, "as it stands" if ran is None else "on one batch", found)


def result_of(look: Look, seen: str, found: tuple[Finding, ...]) -> Audit:
    """What was found in a model, and how."""
    return Audit(type(look.model).__name__, len(look.layers), seen, found)


def _run(look: Look, batch: Any, call: Callable[[Any], Any], loss: Loss | None) -> Ran:
    """One forward and backward pass, and what it showed; the model is as before then."""
    seen = Seen(look, measures=True)
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        restoring(look) as kept,
        _unreduced(look.model),
    ):
        warnings.simplefilter("ignore", LoRAInjectWarning)  # what they tell of is found here
        own = _copied(batch)
        with watching(seen):
            seen.forward = True
            value = _loss(call(own), own, loss)
            seen.forward = False
        reached = set(nodes_behind([value]))
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        return _ran(look, seen, kept, value, reached)


def _ran(look: Look, seen: Seen, kept: Kept, value: Tensor, reached: set[Any]) -> Ran:
    came = [p for p in look.parameters if p.grad is not None and p.grad.numel()]
    largest = numbers(_largest(p.grad) for p in came)
    return Ran(
        seen=seen,
        has_graph=value.requires_grad,
        is_finite=bool(value.detach().isfinite()),
        reached=reached,
        gradients=dict(zip(came, largest, strict=True)),
        moved=tuple(kept.moved()),
        written=tuple(kept.written()),
    )


def _largest(gradient: Any) -> Tensor:
    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
    values = whole(dense)
    return values.abs().max() if values.numel() else torch.zeros(())


def _copied(batch: Any) -> Any:
    """A batch of the same values: a model may write to it, and its tensors may get gradients."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    return tree_map(copied, dict(batch) if isinstance(batch, Mapping) else batch)


def _loss(output: Any, batch: Any, loss: Loss | None) -> Tensor:
    """The number that the backward pass begins with."""
    value = getattr(output, "loss", None) if loss is None else loss(output, batch)
    if loss is None and not isinstance(value, Tensor):
        tensors = list(tensors_in(output))
        if not tensors:
            raise ArgumentError("loss: the model returned no tensor.", remedy="Give loss=.")
        if len(tensors) == 1 and tensors[0].numel() == 1:
            return tensors[0].reshape(())
        grown = [t for t in tensors if t.requires_grad] or tensors[:1]
        return sum((_mean(t) for t in grown[1:]), _mean(grown[0]))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ArgumentError("loss must return one number, in a tensor.")
    return value.reshape(())


def _mean(tensor: Any) -> Tensor:
    values = whole(tensor)
    weights = torch.arange(values.numel(), device=values.device).reshape(values.shape).cos()
    return (values.float() * weights).mean()


def _unreduced(model: nn.Module) -> AbstractContextManager[Any]:
    """Let the ranks of DistributedDataParallel not wait for each other."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
