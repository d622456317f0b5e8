"""What a place in code that reads a weight does with it, from what follows in the bytecode."""

import builtins
import dis
from collections.abc import Mapping
from enum import Enum
from types import FrameType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from lora_inject.kinds.bytecode import steps_of, tells_a_fact

_KEEPING = {"append", "add", "setdefault", "update"}  # methods that keep what they are given


class Reading(Enum):
    """What a weight is read for.

    Attributes:
        NOTHING: for a fact, such as its dtype, or under a name that is not in the code.
        USE: for its values.
        HANDED_ON: for a function that gets it at once, and is none of torch's or Python's own.
    """

    NOTHING = 0
    USE = 1
    HANDED_ON = 2


_known: WeakKeyDictionary[Any, dict[int, Reading]] = WeakKeyDictionary()


def reading_at(reader: FrameType, name: str) -> Reading:
    """What a frame reads an attribute of this name for, at the instruction that runs now."""
    places, offset = _known.setdefault(reader.f_code, {}), reader.f_lasti
    if offset not in places:
        steps = steps_of(reader.f_code)
        at = next((i for i, step in enumerate(steps) if step.offset == offset), None)
        places[offset] = _judged(steps, at, name, reader.f_globals)
    return places[offset]


def _judged(
    steps: list[dis.Instruction], at: int | None, name: str, known: Mapping[str, Any]
) -> Reading:
    # Tools that move or shard weights go by getattr, with a name that they are given.
    if at is None or steps[at].opname != "LOAD_ATTR" or steps[at].argval != name:
        return Reading.NOTHING
    if tells_a_fact(steps, at):
        return Reading.NOTHING
    ends = [i for i, step in enumerate(steps) if _ends_statement(step)]
    begin = max((i for i in ends if i < at), default=0)
    end = min((i for i in ends if i > at), default=len(steps))
    asks = any(_is_looking(step, known) for step in steps[begin:end])
    asks |= steps[at + 1].argval == "detach"  # no step of training follows from that
    return Reading.HANDED_ON if not asks and _is_argument(steps[at + 1 :]) else Reading.USE


def _ends_statement(step: dis.Instruction) -> bool:
    return step.opname.startswith(("STORE_", "POP_TOP", "RETURN_"))


def _is_looking(step: dis.Instruction, known: Mapping[str, Any]) -> bool:
    """Whether a statement with this in it may look at a weight only: compare, print or write it."""
    name = step.argval
    if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
        found = known.get(name, getattr(builtins, name, None))
        owner = found.__name__ if isinstance(found, ModuleType) else found.__class__.__module__
        owner = getattr(found, "__module__", None) or owner
        return owner.split(".")[0] in ("torch", "builtins")
    if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return False
    return name in _KEEPING or name.startswith("lora_")  # who reads A and B too knows of them


def _is_argument(following: list[dis.Instruction]) -> bool:
    """Whether what is on top of the stack becomes an argument of a call."""
    above = 0  # how much stands on top of it
    for step in following:
        name, count = step.opname, step.arg or 0
        calls = name.startswith("CALL") and "INTRINSIC" not in name
        if calls and above < count + name.endswith("KW"):  # the arguments' names stand there too
            return True
        if _ends_statement(step) or "JUMP" in name:
            return False
        above += dis.stack_effect(step.opcode, step.arg)
        if calls and "PRECALL" in dis.opmap:  # where Python counts the arguments there
            above -= count
        if above < 0 or (not above and name in ("LOAD_ATTR", "LOAD_METHOD")):
            return False
    return False
