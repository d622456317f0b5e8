"""What the state of a module is made of: small values, most of them shared by many modules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_inject.settings import BiasMode


@dataclass(frozen=True)
class Injection:
    """One call that put an adapter into a model, as every module that it reached remembers it.

    Attributes:
        id: what tells it from all others, in copies too.
        adapter: the adapter's name.
        bias: the adapter's bias mode.
        said: what its file said besides and saving says again, as JSON; "" where there was none.
        layers: the paths of the layers that it put the adapter on.
        in_full: the paths of the modules that it lets train in full.
        left: what a pattern would have adapted and it could not, by path, with the reasons.
        base: of what weights its file was made for, by path, what ``files.fingerprint`` took.
    """

    id: int
    adapter: str
    bias: BiasMode
    said: str = ""
    layers: frozenset[str] = frozenset()
    in_full: frozenset[str] = frozenset()
    left: Mapping[str, str] = field(default_factory=dict, compare=False)
    base: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)


class Before(NamedTuple):
    """What a module was before the first call.

    Attributes:
        cls: its class.
        training: its mode.
        flags: ``requires_grad`` of its own parameters by name.
        held: whether its running statistics stood still already.
    """

    cls: type[nn.Module]
    training: bool
    flags: tuple[tuple[str, bool], ...]
    held: bool

    def flag(self, name: str) -> bool | None:
        """``requires_grad`` of a parameter; None for one that it had not."""
        return next((flag for known, flag in self.flags if known == name), None)


class Reach(NamedTuple):
    """Which calls reached a module, and in what way.

    Attributes:
        injections: all of them.
        roots: the ids of those that were called on this very module.
        in_full: the adapters that train the module in full.
        tops: those of them for which it was selected itself, and not something around it.
        lent: the names of attributes that a trainer's callback has put on it, each with what was
            there, or nothing.
        noted: the states of modules inside that forget theirs when they are copied, by path.
    """

    injections: tuple[Injection, ...]
    roots: frozenset[int] = frozenset()
    in_full: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()
    lent: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    noted: tuple[tuple[str, Any], ...] = ()  # of State


class Use(NamedTuple):
    """Which adapters run, and which train; one value for all modules that a call put in use.

    Attributes:
        weights: the adapters in use, with the weights that they count with.
        trains: the adapters that train, in use or not.
        beside: by adapter, the others that were in use while it trained, up to this use of them.
        writes: where several are in use, how often each of those that train had been written to
            when they came together.
    """

    weights: Mapping[str, float]
    trains: frozenset[str]
    beside: Mapping[str, frozenset[str]] = {}
    writes: Mapping[str, int] = {}


@dataclass(frozen=True, eq=False)
class Trained:
    """A parameter or buffer of a module that adapters train in place, each in a tensor of its own.

    The first one trains the base's own tensor; every further one gets a tensor of its own. What is
    not in use waits on the same module (``waiting_name``), so that it is moved, cast, copied and
    saved with the model.

    Attributes:
        name: its name.
        is_parameter: whether it is a parameter, which cannot come and go as a buffer may.
        former: its value before any adapter, in CPU memory; None for an empty buffer. Tied places
            share this one object.
        places: how many tied places there are.
        owners: the adapters that own a tensor for it, and whether it trains when they do.
        original: the adapter that trains the base's own tensor; None while that holds the former
            value.
    """

    name: str
    is_parameter: bool
    former: Tensor | None
    places: int
    owners: Mapping[str, bool]
    original: str | None = None

    def text(self, module: nn.Module) -> str:
        """What it is, for errors."""
        return f"{self.name} of a {type(module).__name__}"


class Merged(NamedTuple):
    """What is merged into the weights of a module.

    Attributes:
        adapters: the names.
        former: the value that each weight had before, or None where it was not kept.
        aside: the merged values, while a block shows the former ones.
    """

    adapters: frozenset[str]
    former: Mapping[str, Tensor | None]
    aside: Mapping[str, Tensor] = {}


class Block(NamedTuple):
    """A ``with`` block that the module is inside of.

    Attributes:
        token: what tells it from others.
        rows: for ``per_row``, what computes the module's rows; None for ``disabled``.
    """

    token: object
    rows: Any = None


def waiting_name(name: str, owner: str) -> str:
    """The name under which an owner's tensor waits while it is not in its place."""
    # With the length no two adapters share one; and no bias would be called so.
    return f"lora_{len(owner)}_{owner}_{name}_kept"
