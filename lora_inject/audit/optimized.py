"""What can be seen of an optimizer beside the model that it is to train."""

from collections.abc import Iterator

from torch import Tensor

from lora_inject.audit.findings import Finding
from lora_inject.audit.subject import Subject, has_values, numbers
from lora_inject.core.roles import biases, roles

_SIGNED = ("adam", "lion")  # in the names of those whose steps are about as large as the rate


def _held(s: Subject) -> list[Tensor]:
    return [p for group in s.optimizer.param_groups for p in group["params"]]


def what_it_lacks(s: Subject) -> Iterator[Finding]:
    """What trains and is not optimized."""
    held = {id(parameter) for parameter in _held(s)}
    for parameter in s.look.parameters:
        if parameter.requires_grad and id(parameter) not in held:
            yield Finding("not-optimized", s.places[id(parameter)])


def what_it_holds(s: Subject) -> Iterator[Finding]:
    """What is optimized and does not train, is not here, or is held twice."""
    seen = set[int]()
    for number, group in enumerate(s.optimizer.param_groups):
        for parameter in group["params"]:
            path = s.places.get(id(parameter))
            if id(parameter) in seen:
                yield Finding("optimized-twice", path or "", f"group {number}")
            elif path is None:
                yield Finding(
                    "optimized-elsewhere", "", f"{tuple(parameter.shape)}, group {number}"
                )
            elif not parameter.requires_grad:
                yield Finding("optimized-frozen", path)
            seen.add(id(parameter))


def decay(s: Subject) -> Iterator[Finding]:
    """Weight decay on biases and magnitudes."""
    role_of = roles(s.look)
    without = {id(p) for p in biases(s.look)}
    without |= {id(p) for p, role in role_of.items() if role in ("bias", "lora_magnitude")}
    for group in s.optimizer.param_groups:
        for parameter in group["params"] if group.get("weight_decay") else ():
            if id(parameter) in without and parameter.requires_grad:
                yield Finding("decayed", s.places.get(id(parameter), ""))


def lost_steps(s: Subject) -> Iterator[Finding]:
    """16-bit parameters of which most are rounded back to what they were by a step of this size."""
    if not any(name in type(s.optimizer).__name__.lower() for name in _SIGNED):
        return
    held = [
        (parameter, float(group["lr"]))
        for group in s.optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter.is_floating_point()
        if parameter.dtype.itemsize == 2 and has_values(parameter)
    ]
    lost = numbers((p.detach() - rate == p.detach()).float().mean() for p, rate in held if rate)
    for (parameter, rate), share in zip([h for h in held if h[1]], lost, strict=True):
        if share > 0.5:
            detail = f"{share:.0%} of it at a rate of {rate:g}"
            yield Finding("step-lost", s.places.get(id(parameter), ""), detail)
