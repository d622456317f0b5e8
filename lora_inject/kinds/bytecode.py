"""Which ``.weight`` a function reads, and of what, from its compiled code.

The instructions are gone through in their order, with what each local name may stand for: a path
from the function's first argument (``self``), or something inside of it where it came out of an
index, a loop or a call. In doubt too much is found: an adapter in the weight is right in any case.
"""

import dis
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property, partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

# What tells something about a weight without using its values.
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta",
          "is_cuda", "is_quantized", "element_size", "_is_hf_initialized"}  # fmt: skip
WRITING = frozenset(name for name in dir(Tensor) if name.endswith("_") and not name.startswith("_"))
_OF_CONTAINERS = {"items", "values", "get"}
_SKIPPED = ("EXTENDED_ARG", "CACHE", "PRECALL", "RESUME", "NOP", "COPY_FREE_VARS", "MAKE_CELL")
_ENDS = ("POP_TOP", "RETURN_VALUE", "RETURN_CONST", "YIELD_VALUE")

# The path of a module from ``self``, whose weight is read: () for itself. ANY stands for any number
# of components: for what comes out of an index, a loop or a call.
Read = tuple[str, ...]
Values = frozenset[Read]  # what a value may be
ANY = "*"
NOTHING: Values = frozenset()


def inside(read: Read) -> Read:
    """The same, or whatever is in it."""
    return read if read[-1:] == (ANY,) else (*read, ANY)


def is_meant(read: Read, path: Sequence[str]) -> bool:
    """Whether what is read may be this path."""
    if not read:
        return not path
    if read[0] == ANY:
        return any(is_meant(read[1:], path[n:]) for n in range(len(path) + 1))
    return bool(path) and path[0] == read[0] and is_meant(read[1:], path[1:])


def function_of(member: Any) -> FunctionType | None:
    """The Python function behind a method, a property or a wrapper; None of anything else."""
    for name in ("__func__", "fget", "func"):
        if isinstance(member, (staticmethod, classmethod, property, cached_property, partial)):
            member = getattr(member, name, member)
    if not callable(member) or isinstance(member, type):
        return None
    found = inspect.unwrap(member)
    return found if isinstance(found, FunctionType) else None


def names_in(code: CodeType) -> frozenset[str]:
    """Every attribute and global name that a function and those inside of it mention."""
    inner = [names_in(c) for c in code.co_consts if isinstance(c, CodeType)]
    return frozenset(code.co_names).union(*inner)


def steps_of(code: CodeType) -> list[dis.Instruction]:
    """The instructions of a function that do something."""
    return [step for step in dis.get_instructions(code) if step.opname not in _SKIPPED]


def tells_a_fact(steps: Sequence[dis.Instruction], at: int) -> bool:
    """Whether a weight is read for something other than its values: its dtype, say, or its type."""
    following = [(step.opname, step.argval) for step in steps[at + 1 : at + 3]]
    first, argument = following[0] if following else ("", None)
    if first in ("LOAD_ATTR", "LOAD_METHOD") and argument in _FACTS:
        return True
    if "NONE" in first or (("LOAD_CONST", None) in following[:1] and "IS_OP" in dict(following)):
        return True
    # isinstance(self.wo.weight, ...) asks for the type alone.
    return any(s.argval == "isinstance" for s in steps[max(0, at - 3) : at])


def weights_read(function: FunctionType, owner: type | None = None) -> frozenset[Read]:
    """What of its first argument a function reads the weight of; of a class's method its owner."""
    first = function.__code__.co_varnames[:1]
    return _read(function, {name: frozenset([()]) for name in first}, owner)


def weights_written(function: FunctionType) -> frozenset[Read]:
    """What of its first argument a method writes to the weight of, as in ``p.weight.mul_(2)``."""
    first = function.__code__.co_varnames[:1]
    reader = _Reader(function, None)
    for _ in reader.run(function.__code__, {name: frozenset([()]) for name in first}):
        pass
    return frozenset(reader.writes)


def may_read(function: FunctionType, owner: type, mentions: frozenset[str]) -> bool:
    """Whether a method may read weights at all: most mention neither one nor a helper."""
    if "weight" in mentions:
        return True
    known = function.__globals__
    for name in mentions:
        found = known.get(name)
        if isinstance(found, FunctionType) and _reads_its_arguments(found):
            return True
        if isinstance(found, ModuleType) and not found.__name__.startswith("torch"):
            members = (vars(found).get(other) for other in mentions)
            if any(isinstance(m, FunctionType) and _reads_its_arguments(m) for m in members):
                return True
        if _is_helper(vars(owner).get(name)):
            return True
    return False


def _read(
    function: FunctionType, locals_: Mapping[str, Values], owner: type | None
) -> frozenset[Read]:
    return frozenset(_Reader(function, owner).run(function.__code__, dict(locals_)))


_helping: dict[CodeType, bool] = {}
_asked: ContextVar[frozenset[CodeType]] = ContextVar("_asked", default=frozenset())  # by a thread


def _reads_its_arguments(function: Any, skip_first: bool = False) -> bool:
    """Whether a helper reads the weight of what it is given."""
    found = function_of(function)
    if found is None or "weight" not in names_in(found.__code__):
        return False
    code = found.__code__
    if code in _helping or code in _asked.get():
        return _helping.get(code, False)  # where it calls itself
    given = code.co_varnames[skip_first : code.co_argcount + code.co_kwonlyargcount]
    former = _asked.set(_asked.get() | {code})
    try:
        _helping[code] = bool(_read(found, {n: frozenset([(n,)]) for n in given}, None))
    finally:
        _asked.reset(former)
    return _helping[code]


def _is_helper(member: Any) -> bool:
    """Whether a class's method reads the weight of what it is given, besides ``self``."""
    return _reads_its_arguments(member, not isinstance(member, staticmethod))


class _Reader:
    """One function while it is gone through."""

    def __init__(self, function: FunctionType, owner: type | None) -> None:
        self.globals = function.__globals__
        self.owner = owner
        self.first = function.__code__.co_varnames[:1]
        self.writes: set[Read] = set()

    def run(self, code: CodeType, values: dict[str, Values]) -> Iterator[Read]:
        """Go through a function, twice since loops use what they set, then what is inside of it."""
        own = _Pass(self, code, values)
        own.go()
        before = dict(values)
        own.go()
        yield from own.reads
        inner = {**before, **values, ".0": frozenset(own.looped)}
        for constant in code.co_consts:
            if isinstance(constant, CodeType) and (
                "weight" in names_in(constant) or names_in(constant) & self.globals.keys()
            ):
                own_names = constant.co_varnames[: constant.co_argcount]
                kept = {k: v for k, v in inner.items() if k == ".0" or k not in own_names}
                yield from self.run(constant, kept)


class _Pass:
    """Once through the instructions of one code object."""

    def __init__(self, reader: _Reader, code: CodeType, values: dict[str, Values]) -> None:
        self.reader, self.values = reader, values
        self.steps = steps_of(code)
        self.reads: set[Read] = set()
        self.looped: set[Read] = set()
        self._begin()

    def _begin(self) -> None:
        """A new statement: what it has loaded so far, and what is on top of that now."""
        self.loaded: list[Values] = []
        self.top: Values | None = None  # None: something computed, out of all that was loaded
        self.found: Any = None  # a global, or a module's member
        self.helps = self.stored = self.counts = False

    def go(self) -> None:
        """Every instruction in its order."""
        self._begin()
        for at, step in enumerate(self.steps):
            handler = self._handler(step.opname)
            if self.stored and handler != self._store:
                self._begin()
            if handler is not None:
                handler(at, step)

    def _handler(self, name: str) -> Callable[[int, dis.Instruction], None] | None:
        if name.startswith(("STORE_FAST", "STORE_DEREF", "UNPACK_")):
            return self._store
        if name.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")) and "CLEAR" not in name:
            return self._load
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            return self._attribute
        if name in ("LOAD_GLOBAL", "LOAD_CONST", "LOAD_NAME"):
            return self._outside
        if name in _ENDS or "JUMP" in name or name.startswith("STORE_"):
            return self._end
        if name == "GET_ITER":
            return self._loop
        return None if name in ("SWAP", "COPY", "PUSH_NULL") else self._compute

    def _end(self, at: int, step: dis.Instruction) -> None:
        self._begin()

    def _load(self, at: int, step: dis.Instruction) -> None:
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        for name in names:
            self.top = self.values.get(name, NOTHING)
            self.loaded.append(self.top)
        self.found = None

    def _outside(self, at: int, step: dis.Instruction) -> None:
        known = step.opname != "LOAD_CONST"
        self.found = self.reader.globals.get(step.argval) if known else None
        self._note_helper(self.found)
        self.counts |= known and step.argval == "enumerate"
        self.top = NOTHING

    def _note_helper(self, function: Any, skip_first: bool = False) -> None:
        if isinstance(function, FunctionType) and _reads_its_arguments(function, skip_first):
            self.helps = True

    def _attribute(self, at: int, step: dis.Instruction) -> None:
        name = step.argval
        called = step.opname == "LOAD_METHOD" or "NULL|self" in step.argrepr
        if isinstance(self.found, ModuleType):
            self.found = getattr(self.found, name, None)
            self._note_helper(self.found)
            return
        top = self._everything() if self.top is None else self.top
        if name == "weight":
            self._weight(at, top)
        elif self.top and called:
            self._method(name, self.top)
        elif self.top:
            self.top = frozenset((*read, name) for read in self.top)
            self.loaded[-1] = self.top

    def _weight(self, at: int, top: Values) -> None:
        if not tells_a_fact(self.steps, at):
            self.reads |= top
        following = self.steps[at + 1].argval if at + 1 < len(self.steps) else None
        if following in WRITING:
            self.reader.writes |= top
        self.top = NOTHING

    def _method(self, name: str, top: Values) -> None:
        """A method of a module: of a container its members, of oneself perhaps a helper."""
        if name in _OF_CONTAINERS:
            self.loaded[-1] = frozenset(map(inside, top))
            self.counts |= name == "items"
            return
        self.loaded.pop()  # it is called, and what comes out is a result
        if () in top and self.reader.owner is not None:
            self.helps |= _is_helper(inspect.getattr_static(self.reader.owner, name, None))
        self.top = NOTHING

    def _compute(self, at: int, step: dis.Instruction) -> None:
        if self.helps and step.opname.startswith("CALL"):
            self.reads |= {read for read in self._everything() if read != (ANY,)}
        self.top = self.found = None

    def _loop(self, at: int, step: dis.Instruction) -> None:
        self.looped |= self._everything()
        self.top = self.found = None

    def _store(self, at: int, step: dis.Instruction) -> None:
        if step.opname.startswith("UNPACK_"):
            self.top = None
            return
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        computed = (
            self.top is None
        )  # else it is one of what was loaded, as in p, q = self.p, self.q
        value = self._everything() if computed else NOTHING.union(*self.loaded)
        for name in names if "LOAD" not in step.opname else names[:1]:
            if self.counts and self.steps[at - 1].opname == "UNPACK_SEQUENCE" and name == names[0]:
                continue  # a number or a name, which stands first
            self.values[name] = self.values.get(name, NOTHING) | value
        self.stored = True
        if "LOAD" in step.opname:
            self._begin()
            self._load(at, step._replace(argval=names[1]))

    def _everything(self) -> Values:
        """What something that was computed of all that was loaded may be."""
        return frozenset(inside(read) for values in self.loaded for read in values)
