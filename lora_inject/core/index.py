"""The modules of a model, found in one walk: each once, in registration order, with its paths."""

from collections.abc import Iterable, Iterator
from functools import cached_property

from torch import nn

from lora_inject.core.patterns import NamedModule
from lora_inject.errors import UnsupportedLayerError


class Index:
    """One walk of a model; what was found is kept, and nothing of it is asked of the model again.

    Args:
        model: the model; its modules must stay the same while the index is in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def _visits(self) -> list[tuple[nn.Module, int, str]]:
        """Every path once: the module there, which visit led to it, and its name there."""
        visits: list[tuple[nn.Module, int, str]] = []
        open_ends = [(self.model, -1, "")]
        while open_ends:
            visit = open_ends.pop()
            children = visit[0]._modules
            if len(children):
                at = len(visits)
                named = [(m, at, name) for name, m in children.items() if m is not None]
                open_ends += reversed(named)
            visits.append(visit)
        _require_identity(module for module, _, _ in visits)
        return visits

    @cached_property
    def by_path(self) -> dict[str, nn.Module]:
        """The modules by every path that leads to them."""
        paths: list[str] = []
        found: dict[str, nn.Module] = {}
        for module, parent, name in self._visits:
            above = paths[parent] if parent >= 0 else ""
            paths.append(f"{above}.{name}" if above else name)
            found[paths[-1]] = module
        return found

    @property
    def children(self) -> Iterator[tuple[nn.Module, str, nn.Module]]:
        """(parent, name, child) of every path but the model's own."""
        visits = self._visits
        for module, parent, name in visits[1:]:
            yield visits[parent][0], name, module

    @cached_property
    def paths(self) -> dict[nn.Module, tuple[str, ...]]:
        """Every module once, with its paths."""
        found: dict[nn.Module, tuple[str, ...]] = {}
        for path, module in self.by_path.items():
            found[module] = (*found[module], path) if module in found else (path,)
        return found

    @cached_property
    def named(self) -> list[NamedModule]:
        """The same, as patterns read it."""
        return [NamedModule(*item) for item in self.paths.items()]

    @cached_property
    def modules(self) -> list[nn.Module]:
        """Every module once."""
        return list({visit[0]: None for visit in self._visits})

    def is_like(self, other: "Index") -> bool:
        """Whether another walk met the same modules in the same places."""
        return self._visits == other._visits

    def path(self, module: nn.Module, name: str = "") -> str:
        """The first path of a module, or of what it has under a name."""
        path = self.paths[module][0]
        return f"{path}.{name}".lstrip(".") if name else path

    def below(self, top: nn.Module) -> list[nn.Module]:
        """A module of the model with everything inside of it."""
        return self.modules if top is self.model else _inside(top)


def _require_identity(modules: Iterable[nn.Module]) -> None:
    """Refuse modules that compare by value, of which torch too takes two equal ones for one.

    Raises:
        UnsupportedLayerError: there are such.
    """
    own = {id(m): m for m in modules if type(m).__eq__ is not object.__eq__}
    try:
        apart = len(set(own.values())) == len(own)
    except TypeError:  # which torch cannot walk
        apart = False
    if not apart:
        names = ", ".join(sorted({type(module).__name__ for module in own.values()}))
        raise UnsupportedLayerError(
            f"modules of the model compare by value ({names}), so that torch takes equal ones for "
            "one, in parameters() too.",
            remedy="Let them compare by identity: @dataclass(eq=False), no __eq__.",
        )


def _inside(top: nn.Module) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    open_ends = [top]
    while open_ends:
        module = open_ends.pop()
        if module not in found:
            found[module] = None
            children = module._modules
            if len(children):
                open_ends += [m for m in reversed(list(children.values())) if m is not None]
    return list(found)
