"""What patterns select in a model: its modules and parameters by name, class or test."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from lora_inject.core.look import Look
from lora_inject.core.output_heads import find_heads
from lora_inject.core.patterns import NamedModule, Pattern, close_names
from lora_inject.core.state import owned
from lora_inject.errors import NoMatchError
from lora_inject.kinds import Kind, find_kind
from lora_inject.kinds.bias import is_bias
from lora_inject.kinds.products import is_factor
from lora_inject.kinds.refusals import script_refusal
from lora_inject.printing import few
from lora_inject.settings import BASE
from lora_inject.sharding import whole_numel, whole_shape

_EXPRESSION = frozenset("|()^$+\\")  # what is in no path and no glob


Key = tuple[nn.Module, str | None]  # what tells a target from others


class Target(NamedTuple):
    """Something that a pattern can select: a module, or with a name one of its own parameters."""

    named: NamedModule
    parameter: str | None = None

    @property
    def path(self) -> str:
        """Its first path in the model."""
        return self.paths[0]

    @property
    def paths(self) -> tuple[str, ...]:
        """All of its paths."""
        if self.parameter is None:
            return self.named.paths
        return tuple(f"{path}.{self.parameter}".lstrip(".") for path in self.named.paths)

    @property
    def module(self) -> nn.Module:
        """The module, or the owner of the parameter."""
        return self.named.module

    @property
    def key(self) -> Key:
        """What tells it from others, whatever pattern selected it."""
        return self.module, self.parameter

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter itself, which an adapted module shows in another form."""
        parameter = self.module._parameters[self.parameter or ""]
        assert parameter is not None
        return parameter

    @property
    def type(self) -> str:
        """Its type in words."""
        if self.parameter is None:
            return type(self.module).__name__
        return f"Parameter {tuple(self.tensor.shape)}"


class Exclusions(NamedTuple):
    """What targets may select and the plan still leaves alone.

    Attributes:
        excluded: modules, each with the pattern that excludes it.
        in_full: modules that train in full.
        layers: the indices of the blocks to keep; None for all.
    """

    excluded: Mapping[nn.Module, str]
    in_full: frozenset[nn.Module]
    layers: tuple[int, ...] | None


class Matcher:
    """A model as planning sees it, and the questions asked of it."""

    def __init__(self, look: Look) -> None:
        self.look = look
        self.model = look.model
        self.named = look.index.named
        self.by_path = look.index.by_path
        self._kinds: dict[nn.Module, Kind | None] = {}

    def kind(self, module: nn.Module) -> Kind | None:
        """The kind of a module, or None where there is none."""
        if module not in self._kinds:
            self._kinds[module] = find_kind(module)
        return self._kinds[module]

    def is_able(self, target: Target) -> bool:
        """Whether a target is a layer with a kind, or a parameter."""
        return target.parameter is not None or self.kind(target.named.module) is not None

    @cached_property
    def heads(self) -> dict[nn.Module, str]:
        """The output heads, looked for when somebody asks."""
        return find_heads(self.named)

    @cached_property
    def matrices(self) -> list[Target]:
        """Parameters of two dimensions or more that belong to no layer with a kind."""
        return [
            Target(named, name)
            for named in self.named
            if len(named.module._parameters)
            for name, parameter in named.module._parameters.items()
            if parameter is not None and not is_lazy(parameter) and len(whole_shape(parameter)) > 1
            if self.kind(named.module) is None and not is_bias(named.module, name)
        ]

    @cached_property
    def factors(self) -> list[Target]:
        """Those of them that their module multiplies by, as a Linear does, the largest first."""
        own = [t for t in self.matrices if is_factor(t.module, t.parameter or "", t.tensor)]
        return sorted(own, key=lambda target: -whole_numel(target.tensor))

    def modules_of(self, argument: str, pattern: Pattern) -> list[NamedModule]:
        """The modules that a pattern of ``exclude`` or ``train_also`` selects.

        Raises:
            NoMatchError: there is none.
        """
        if selected := self._selected(pattern):
            return selected
        of_parameter = pattern.by_name and any(
            pattern.names(path) for t in self.matrices for path in t.paths
        )
        problem = f"{argument}: {self.no_match(pattern)}"
        remedy = "It names a parameter; name the module that owns it." if of_parameter else ""
        if not remedy and problem.endswith("nothing."):  # without a hint
            remedy = f"There are {few(self._parts(), 8)}."
        raise NoMatchError(problem, remedy=remedy)

    def _parts(self) -> list[str]:
        """The paths of the output heads and of the parts that the model is made of."""
        heads = [self.look.index.path(head) for head in self.heads]
        parts = [p for p in self.named if p.path and "." not in p.path]
        able = [named.path for named in parts if self._can_train(named.module)]
        return list(dict.fromkeys((*heads, *able)))

    def _selected(self, pattern: Pattern) -> list[NamedModule]:
        """The modules that a pattern selects; of a plain name only those that end so are asked."""
        if pattern.last is None:
            return [named for named in self.named if pattern.selects(named)]
        return [named for named in self._by_last.get(pattern.last, ()) if pattern.selects(named)]

    @cached_property
    def _by_last(self) -> dict[str, list[NamedModule]]:
        """The modules by the last components of their paths."""
        found: dict[str, list[NamedModule]] = {}
        for named in self.named:
            for last in {path.rpartition(".")[2] for path in named.paths}:
                found.setdefault(last, []).append(named)
        return found

    def targets_of(self, pattern: Pattern) -> list[Target]:
        """What a target pattern selects: modules, and parameters that it names.

        The only matrix of a layer is the layer. A glob or an expression names parameters only if
        it selects no layer: written for layers, it would otherwise catch every matrix on the way.
        """
        selected = [Target(named) for named in self._selected(pattern)]
        exact = pattern.by_name and not pattern.wide  # those of files have no last component
        if exact and not selected and "." in pattern.label:
            selected = [Target(named) for named in self._layers_by_matrix(pattern)]
        if exact or (pattern.by_name and not any(map(self.is_able, selected))):
            selected += [t for t in self.matrices if any(pattern.names(path) for path in t.paths)]
        return selected

    def _layers_by_matrix(self, pattern: Pattern) -> list[NamedModule]:
        """The layers of whose only matrix a pattern is the name."""
        return [
            named
            for named in self.named
            if self._matrices_of(named.module) == [pattern.last]
            if any(pattern.names(path) for path in Target(named, pattern.last).paths)
            if self.kind(named.module) is not None
        ]

    def _matrices_of(self, module: nn.Module) -> list[str]:
        """The names of a module's own parameters of two dimensions or more, but for adapters'."""
        ours = {n for n, owner, _ in owned(self.look.states.get(module)) if owner != BASE}
        own = module._parameters.items()
        return [n for n, p in own if p is not None and n not in ours and len(whole_shape(p)) > 1]

    def no_match(self, pattern: Pattern) -> str:
        """The sentence for a pattern that selects nothing."""
        names = [*self.by_path, *(target.path for target in self.matrices)]
        close = close_names(pattern.label, names) if pattern.by_name else []
        hint = f" Close names: {', '.join(close)}." if close else ""
        by_name = pattern.by_name and not pattern.label.startswith("re:")
        if by_name and not _EXPRESSION.isdisjoint(pattern.label):
            text = pattern.label if pattern.label.startswith(".*") else f".*({pattern.label})"
            hint = f' A regular expression begins with "re:" and matches whole paths: "re:{text}".'
        return f"{pattern.label!r} matches nothing.{hint}"

    def subtrees(self, argument: str, patterns: Iterable[Pattern]) -> dict[nn.Module, str]:
        """Every module that a pattern selects or that lies below one, with the pattern's label."""
        return {
            module: pattern.label
            for pattern in patterns
            for named in self.modules_of(argument, pattern)
            for module in self.look.index.below(named.module)
        }

    def trainable_modules(self, argument: str, patterns: Iterable[Pattern]) -> dict[str, nn.Module]:
        """The selected modules by path that hold something that can train.

        Raises:
            NoMatchError: a pattern selects no such module.
        """
        selected: dict[str, nn.Module] = {}
        for pattern in patterns:
            modules = self.modules_of(argument, pattern)
            able = {named.path: named.module for named in modules if self._can_train(named.module)}
            if not able:
                raise NoMatchError(
                    f"{argument}: {pattern.label!r} selects no module with "
                    "parameters that can train.",
                    path=modules[0].path,
                    remedy="Name a module that can train.",
                )
            selected |= able
        return selected

    def _can_train(self, top: nn.Module) -> bool:
        own = [p for module in self.look.index.below(top) for p in module._parameters.values()]
        return any(p is not None and (p.is_floating_point() or p.is_complex()) for p in own)

    def adaptable_names(self) -> str:
        """The last components of the paths of everything that has a kind, for a message."""
        names = [p.path.rpartition(".")[2] for p in self.named if self.kind(p.module) is not None]
        return few(sorted(set(names) - {""}), 20) or "none"

    def adaptable_below(self, targets: Iterable[Target]) -> list[str]:
        """Paths of layers with a kind inside these modules."""
        inside = {m for target in targets for m in self.look.index.below(target.module)}
        return [p.path for p in self.named if p.module in inside and self.kind(p.module)]

    def matrices_below(self, targets: Iterable[Target]) -> list[str]:
        """Paths of parameters inside these modules that can be adapted by them."""
        below = {m for target in targets for m in self.look.index.below(target.module)}
        inside = {module for module in below if not script_refusal(module)}
        return [t.path for t in self.matrices if t.module in inside and t.tensor.dim() < 4]
