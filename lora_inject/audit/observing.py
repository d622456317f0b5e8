"""Watching a model while it runs: which layers ran, with what, and what came out of them.

Hooks see calls of modules; a mode of torch sees what functions are given, and so a weight that is
used outside of its own layer. Nothing that is computed is changed, and nothing is waited for: what
has to be known of values is kept as tensors on their device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_inject.audit.measuring import Sizes, measure, tensors_in
from lora_inject.compat.marks import is_compiled
from lora_inject.compat.torch_private import checkpointed_parts
from lora_inject.core.look import Look
from lora_inject.core.state import State
from lora_inject.own import STATE, own_tensor
from lora_inject.sharding import is_distributed

_DROPOUTS = {"dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d",
             "dropout3d"}  # fmt: skip
# What reads no value of a tensor, but its dtype, device or shape; or so of the second one.
_WITHOUT_VALUES = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like",
                   "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}  # fmt: skip
_LIKE_THE_SECOND = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


class Runs:
    """What the calls of one adapted layer were.

    Attributes:
        calls: how many there were, in the forward pass.
        without_graph: how many of them ran with gradients off.
        nodes: of the graph, those that made its output.
        checkpointed: whether one of those was in a reentrant checkpoint.
        used: the adapters, with their weights, of each call with gradients on.
        other_weight: whether a weight was another one than before the run.
        sizes: of what the adapters add and of the layer's output.
    """

    def __init__(self) -> None:
        self.calls = self.without_graph = 0
        self.checkpointed = self.other_weight = False
        self.used: set[tuple[Any, ...]] = set()
        self.nodes: list[Any] = []
        self.sizes = Sizes()


class Seen:
    """What is seen of a model.

    Args:
        look: the model.
        measures: whether what adapters add is measured, which computes their layers once more.
        keeps_graph: whether nodes of the graph are kept, which keeps all of it.

    Attributes:
        forward: whether calls count now; a backward pass may compute modules again.
        runs: of each adapted layer.
        flags: of every output, in the order in which they came: the module, and whether no number
            is NaN or infinity (minus infinity is what masks are made of).
        nodes: of the graph, those that made the outputs of modules.
        outside: (layer, module) where the weight of a layer was used by another module.
        tied: the same, where it is that module's own weight.
        dropouts: modules in eval mode that called dropout as in training.
        early: modules with a graph before the first one that trains.
        elements: of the parameters of all that ran.
        compiled: what runs a compiled graph, in which nothing is seen.
    """

    def __init__(self, look: Look, measures: bool, keeps_graph: bool = True) -> None:
        self.look, self.measures, self.keeps_graph = look, measures, keeps_graph
        self.forward, self.busy = False, False
        self.runs = {layer: Runs() for layer in look.layers.values()}
        self.flags: list[tuple[nn.Module, Tensor]] = []
        self.nodes: list[Any] = []
        self.outside: dict[tuple[nn.Module, nn.Module], None] = {}
        self.tied: dict[tuple[nn.Module, nn.Module], None] = {}
        self.dropouts: dict[nn.Module, None] = {}
        self.early: dict[nn.Module, None] = {}
        self.elements: dict[nn.Module, int] = {}
        tops = [module for module in look.index.modules if is_compiled(module)]
        self.compiled = {module for top in tops for module in look.index.below(top)}
        self._stack: list[nn.Module] = []
        self._trainable = {
            module
            for module in look.index.modules
            if any(p is not None and p.requires_grad for p in module._parameters.values())
        }
        self._begun = False  # whether one of these has run
        self._aliases = _weights(look)
        self._own = {
            layer: {n: id(own_tensor(layer, n)) for n in _weight_names(look.states[layer])}
            for layer in self.runs
        }

    # --- calls of modules -----------------------------------------------------------------------

    def enter(self, module: nn.Module, _: Any) -> None:
        """A module is called."""
        if self.forward and not self.busy:
            self._stack.append(module)
            self._begun = self._begun or module in self._trainable

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module returns."""
        if not self.forward or self.busy or module not in self._stack:
            return
        while self._stack.pop() is not module:
            pass
        self.busy, with_graph = True, torch.is_grad_enabled()
        try:
            with torch.no_grad():
                self._note(module, output)
                if module in self.runs:
                    self._note_layer(module, with_graph, output)
                    if self.measures:
                        state, sizes = module.__dict__[STATE], self.runs[module].sizes
                        measure(sizes, module, state, args, kwargs, output)
        finally:
            self.busy = False

    def _note(self, module: nn.Module, output: Any) -> None:
        if module not in self.elements:
            own = (p.numel() for p in module._parameters.values() if p is not None)
            self.elements[module] = sum(own)
        for tensor in tensors_in(output):
            values: Any = tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
            self.flags.append((module, (values < torch.inf).all()))
            if self.keeps_graph and tensor.grad_fn is not None and module is not self.look.model:
                self.nodes.append(tensor.grad_fn)
            if tensor.requires_grad and not self._begun and self.elements[module]:
                self.early[module] = None

    def _note_layer(self, layer: nn.Module, with_graph: bool, output: Any) -> None:
        runs, state = self.runs[layer], layer.__dict__[STATE]
        runs.calls += 1
        if with_graph:
            runs.used.add(tuple((term.adapter, term.factor) for term in state.running))
        else:
            runs.without_graph += 1
            runs.checkpointed = runs.checkpointed or any(True for _ in checkpointed_parts())
        if self.keeps_graph:
            runs.nodes += [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        now = {name: own_tensor(layer, name) for name in self._own[layer]}
        swapped = any(t is not None and id(t) != self._own[layer][n] for n, t in now.items())
        runs.other_weight = runs.other_weight or swapped

    # --- calls of functions ---------------------------------------------------------------------

    def used(self, function: Any, args: Any, kwargs: Any, made: Any) -> None:
        """A function of torch was called.

        A view or a copy of a weight counts as the weight; it is used where it meets another tensor.
        """
        if not self._stack:
            return
        name, given = _name(function), [t for arg in (*args, *kwargs.values()) for t in _few(arg)]
        for tensor in given[:1] if name in _LIKE_THE_SECOND else given:
            _, layers = self._aliases.get(id(tensor), (tensor, ()))
            if not layers or name in _WITHOUT_VALUES or not set(layers).isdisjoint(self._stack):
                continue
            if len(given) > 1 and name not in _LIKE_THE_SECOND:
                self._used_by(self._stack[-1], tensor, layers)
            else:
                for each in _few(made):
                    self._aliases.setdefault(id(each), (each, layers))
        if name in _DROPOUTS and not self._stack[-1].training and _drops(args, kwargs):
            self.dropouts[self._stack[-1]] = None

    def _used_by(self, reader: nn.Module, tensor: Tensor, layers: Sequence[nn.Module]) -> None:
        own = any(tensor is parameter for parameter in reader._parameters.values())
        for layer in layers:
            (self.tied if own else self.outside)[layer, reader] = None


class Hook:
    """A hook that calls a function, and on a copy of the model, which is not watched, none."""

    def __init__(self, function: Callable[..., object] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """Call it."""
        if self.function is not None:
            self.function(*args)

    def __reduce__(self) -> Any:
        return Hook, ()


class _Functions(TorchFunctionMode):
    """Shows what is called of torch, and calls it."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if self.seen.forward and not self.seen.busy:
            self.seen.used(func, args, kwargs, made)
        return made


@contextmanager
def watching(seen: Seen) -> Iterator[None]:
    """Watch calls of modules, and of functions where nothing is compiled: it would be anew."""
    handles = hooked(seen)
    try:
        with _Functions(seen) if not seen.compiled else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def hooked(seen: Seen) -> list[Any]:
    """Put the hooks on all modules but compiled ones; the handles take them off."""
    handles: list[Any] = []
    options = {"with_kwargs": True, "prepend": True, "always_call": True}
    for module in seen.look.index.modules:
        if module not in seen.compiled:
            handles.append(module.register_forward_pre_hook(Hook(seen.enter)))
            handles.append(module.register_forward_hook(Hook(seen.leave), **options))
    return handles


def _weight_names(state: State) -> list[str]:
    return [spec.weight for adapter in state.adapters for spec in adapter.specs]


def _weights(look: Look) -> dict[int, tuple[Tensor, Sequence[nn.Module]]]:
    """The weights beside whose layer's forward something runs, with those layers, by id."""
    found: dict[int, tuple[Tensor, Sequence[nn.Module]]] = {}
    for layer, adapter in look.adapters:
        running = {term.adapter for term in look.states[layer].running}
        for spec in adapter.specs if adapter.way == "branch" and adapter.name in running else ():
            tensor = own_tensor(layer, spec.weight)
            if tensor is not None:
                _, layers = found.get(id(tensor), (tensor, ()))
                found[id(tensor)] = (tensor, tuple(dict.fromkeys((*layers, layer))))
    return found


def _name(function: Any) -> str:
    return getattr(function, "__name__", "")


def _few(value: Any) -> list[Tensor]:
    """The tensors of an argument: itself, or those of a list."""
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, (list, tuple)) else []


def _drops(args: Any, kwargs: Any) -> bool:
    """Whether a dropout function drops anything."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return bool(p) and bool(kwargs.get("training", args[2] if len(args) > 2 else True))
