"""The table of checks: a new one is a function of its file and a line here."""

from collections.abc import Callable, Iterator

from lora_inject.audit import optimized, running, standing
from lora_inject.audit.findings import Finding, in_order
from lora_inject.audit.subject import Subject

Check = Callable[[Subject], Iterator[Finding]]

STANDING: tuple[Check, ...] = (
    standing.adapters_there,
    standing.adapters_asleep,
    standing.drifted,
    standing.copies_without,
    standing.left_alone,
    standing.another_base,
    standing.missing_beside,
    standing.dead,
    standing.unmoved,
    standing.devices,
    standing.half_precision,
    standing.stale_gradients,
    standing.modes,
)
OPTIMIZED: tuple[Check, ...] = (
    optimized.what_it_lacks,
    optimized.what_it_holds,
    optimized.decay,
    optimized.lost_steps,
)
RUNNING: tuple[Check, ...] = (
    running.loss,
    running.not_finite,
    running.layers_that_ran,
    running.in_place,
    running.zero_gradients,
    running.weights,
    running.sizes,
    running.what_moved,
    running.dropouts,
    running.early_graph,
)


def found_by(checks: tuple[Check, ...], subject: Subject) -> tuple[Finding, ...]:
    """What these checks find, in order."""
    return in_order(finding for check in checks for finding in check(subject))
