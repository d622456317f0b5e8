"""The modules of a model, found in one walk: each once, in registration order, with its paths."""

from functools import cached_property

from torch import nn

from lora_inject.targets import Place


class Index:
    """One walk of a model; what was found is kept, and nothing of it is asked of the model again.

    Args:
        model: the model; its modules must stay the same while the index is in use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def by_path(self) -> dict[str, nn.Module]:
        """The modules by every path that leads to them."""
        found: dict[str, nn.Module] = {}

        def visit(path: str, module: nn.Module) -> None:
            found[path] = module
            for name, child in module._modules.items():
                if child is not None:
                    visit(f"{path}.{name}" if path else name, child)

        visit("", self.model)
        return found

    @cached_property
    def paths(self) -> dict[nn.Module, tuple[str, ...]]:
        """Every module once, with its paths."""
        found: dict[nn.Module, tuple[str, ...]] = {}
        for path, module in self.by_path.items():
            found[module] = (*found[module], path) if module in found else (path,)
        return found

    @cached_property
    def places(self) -> list[Place]:
        """The same as the patterns read it."""
        return [Place(module, paths) for module, paths in self.paths.items()]

    @cached_property
    def modules(self) -> list[nn.Module]:
        """Every module once."""
        return list(self.paths)

    def path(self, module: nn.Module) -> str:
        """The first path of a module."""
        return self.paths[module][0]

    def below(self, top: nn.Module) -> list[nn.Module]:
        """A module of the model with everything inside of it."""
        return self.modules if top is self.model else _inside(top)


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
