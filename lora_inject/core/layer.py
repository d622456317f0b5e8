"""What an adapted layer computes: the forward methods of the classes that layers are swapped to.

A and B are parameters of the layer itself; what else is known of it is its state.
"""

import threading
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.linear import Branch, adapted_linear, may_run_whole
from lora_inject.compat.torch_private import is_removing_parametrizations
from lora_inject.core.adapter import Adapter, Term
from lora_inject.core.dropping import dropout_now, drops_now
from lora_inject.core.printed import adapters_text, has_other_children
from lora_inject.core.recomputing import note_run
from lora_inject.core.scales import SCALES, Scales, scales_of
from lora_inject.core.sharded import following, is_of_fsdp
from lora_inject.core.starting import start_anew, without_values
from lora_inject.core.state import State
from lora_inject.core.tools import (
    keeping_values,
    refuse_removal,
    refuse_script,
    require_values,
    shallow_copy,
)
from lora_inject.errors import LoRAInjectError
from lora_inject.kinds.base import Kind
from lora_inject.kinds.experts import any_answers_itself
from lora_inject.kinds.shown import bare, shown
from lora_inject.own import STATE
from lora_inject.sharding import is_distributed
from lora_inject.variants import Change, Variant


class _Computed(threading.local):
    """The effective weights of the layers whose forward runs now, in each thread of its own."""

    def __init__(self) -> None:
        self.of: dict[nn.Module, dict[Any, Any]] = {}


_computed = _Computed()


class LoRALayer(nn.Module):
    """The class that an adapted layer is an instance of, besides its own, while an adapter runs.

    With no adapter in use, merged or disabled, a layer has its own class alone.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2)
        >>> isinstance(model[0], LoRALayer), isinstance(model[0], nn.Linear)
        (True, True)
        >>> model[0].lora_A.shape, model[0].lora_adapters[0].settings.scaling
        (torch.Size([2, 4]), 1.0)
    """

    _lora_rebuild: ClassVar[Any]
    _lora_base: ClassVar[type[nn.Module]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """With arguments, as in ``type(layer)(8, 8)``, a new layer of the layer's own class."""
        return cls._lora_base(*args, **kwargs) if args or kwargs else super().__new__(cls)

    __copy__ = shallow_copy
    __prepare_scriptable__ = refuse_script  # which torch.jit.script calls first

    @property
    def parametrizations(self) -> Any:
        """Those of the layer, while nothing is removing them."""
        going = not torch.compiler.is_compiling() and is_removing_parametrizations()
        if going and "_lora_base" in vars(type(self)):  # and not in a class on top of ours
            refuse_removal(self)
        if "parametrizations" not in self._modules:
            raise AttributeError("the layer has no parametrizations")
        return self._modules["parametrizations"]

    def __init_subclass__(cls) -> None:
        """Says nothing to the module's own class, which may ask for arguments."""

    @property
    def lora_adapters(self) -> tuple[Adapter, ...]:
        """The adapters on this layer, whether they are in use or not."""
        state: State = self.__dict__[STATE]
        return state.adapters

    def extra_repr(self) -> str:
        """The layer's own, then the adapters."""
        return ", ".join(filter(None, [super().extra_repr(), adapters_text(self)]))

    def __repr__(self) -> str:
        """In one line, which says what the children for dropout do."""
        if has_other_children(self):
            return super().__repr__()
        return f"{type(self).__name__}({self.extra_repr()})"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also what ``parallelize_module`` calls: A and B take the placements of their weight."""
        if param is not None and is_distributed(param) and not is_of_fsdp(self):
            param = following(self, self.lora_adapters, name, param)
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        empty = without_values(self)
        super()._apply(keeping_values(self, fn), recurse)  # type: ignore[no-untyped-call]
        start_anew(self, empty)
        # On the device where the adapters are now.
        with torch.inference_mode(False):
            known, state = self.__dict__[SCALES], self.__dict__[STATE]
            self.__dict__[SCALES] = scales_of(state.running, known, self._parameters)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class cannot be imported by name: rebuild it from the layer's own class.
        make, args, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if args[:1] == (type(self),):
            base = self.__dict__[STATE].before.cls
            make, args = type(self)._lora_rebuild, (base, self.lora_adapters, make, args[1:])
        return (make, args, *rest)


class BranchLayer(LoRALayer):
    """An adapted layer whose own forward runs, and whose adapters add to what it returns."""

    _lora_input: ClassVar[tuple[int, str]]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own forward, plus what each adapter adds for its input."""
        if not isinstance(self, LoRALayer):  # a tool has kept this method from before
            return type(self).forward(self, *args, **kwargs)
        y: Tensor = super().forward(*args, **kwargs)
        if not isinstance(y, Tensor):
            raise LoRAInjectError(
                f"its forward returned a {type(y).__name__}, to which nothing can be added.",
                path=self.lora_adapters[0].path,
                remedy='strip, and inject with how="weight".',
            )
        at, name = self._lora_input
        x: Tensor = args[at] if len(args) > at else kwargs[name]
        state: State = self.__dict__[STATE]
        if not torch.compiler.is_compiling():
            note_run(self)
        if state.rows is not None:
            return cast(Tensor, state.rows.add(self, x, y))
        return self._lora_added(x, y, y, state.running)

    def _lora_added(self, x: Tensor, former: Tensor, y: Tensor, terms: Sequence[Term]) -> Tensor:
        """An output y with what these terms add to it; ``former`` is the layer's own."""
        # A compiler makes a constant of a number, and compiles again when it changes.
        compiles = torch.compiler.is_compiling()
        for term in terms:
            factor = self.__dict__[SCALES][term.adapter][1] if compiles else term.factor
            tensors = {role: getattr(self, name) for role, name in term.names.items()}
            require_values(self, x, tensors.values())
            if term.drops and (drops := drops_now(self, term.dropping)):
                factor, tensors = drops.factor(factor, y), drops.thinned(tensors)
            change = term.change(tensors, factor, dropout_now(self, term))
            y = term.variant.add_to_output(term.kind, self, x, former, y, change)
        return y


class WholeLayer(BranchLayer):
    """A branch layer whose own forward is ``W x + b``, which it computes with the adapters at once.

    Only where that is known to be the same (``may_run_whole``), and with those that stand first and
    are a ``B A``. Others are added to that: an adapter that is new, and stands last, then changes
    nothing of how the former ones are computed, and no bit of the output.
    """

    _lora_transposed: ClassVar[bool]
    _lora_product: ClassVar[tuple[type[nn.Module], Any]]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``W x + b``, plus what each adapter adds."""
        if not isinstance(self, LoRALayer):  # a tool has kept this method from before
            return type(self).forward(self, *args, **kwargs)
        x: Tensor = args[0] if args else kwargs[self._lora_input[1]]
        state: State = self.__dict__[STATE]
        own: Any = self._parameters  # a weight that is not here is computed when it is read
        cls, known = self._lora_product
        if state.running and "bias" in own and cls.forward is known:  # nobody has patched it since
            W, branches = own.get("weight"), _branches(self, own, state.running)
            if branches and may_run_whole(x, W, branches):
                note_run(self)
                W_OI, rest = W.t() if self._lora_transposed else W, state.running[len(branches) :]
                y = adapted_linear(x, W_OI, own["bias"], branches)
                y = finished(self, state.running[0], own, y)
                if not rest:
                    return y
                plain = all(term.variant.additive for term in rest)
                former = y if plain else adapted_linear(x, W_OI, own["bias"], ())
                return self._lora_added(x, former, y, rest)
        return super().forward(*args, **kwargs)


def _branches(layer: nn.Module, own: Any, terms: Sequence[Term]) -> list[Branch]:
    """What ``adapted_linear`` is to add: the first terms that are a ``B A``, or one to finish."""
    found: list[Branch] = []
    for term in terms:
        drops = term.drops and drops_now(layer, term.dropping)
        if not (term.plain or (term.finishes and not found and not drops)):
            break
        A, B = own.get(term.names["A"]), own.get(term.names["B"])
        if A is not None and B is not None:
            if drops:
                B = drops.folded({"B": B})["B"]
            if term.spec.swapped:
                turned = term.variant.turned({"A": A, "B": B})
                A, B = turned["A"], turned["B"]
        found.append((A, B, term.factor, dropout_now(layer, term), term.part))
        if term.finishes:
            break
    return found


def finished(layer: nn.Module, term: Term, own: Any, y: Tensor) -> Tensor:
    """The output of a layer to which ``adapted_linear`` added the ``B A`` of its first term."""
    if not term.finishes:
        return y
    tensors = {role: own[name] for role, name in term.names.items()}
    require_values(layer, y, tensors.values())
    return term.variant.finish(term.kind, layer, y, term.change(tensors, term.factor))


class WeightLayer(LoRALayer):
    """An adapted layer that reads effective weights where its weights were.

    A weight is computed when it is read, and once for each forward pass of the layer itself, which
    may read it several times.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        if not isinstance(self, LoRALayer):  # a tool has kept this method from before
            return type(self).forward(self, *args, **kwargs)
        # A compiler computes equal things once by itself; some tensors take tensors alone.
        if torch.compiler.is_compiling() or any_answers_itself((*args, *kwargs.values())):
            return super().forward(*args, **kwargs)
        former = _computed.of.get(self)
        _computed.of[self] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            if former is None:
                del _computed.of[self]
            else:
                _computed.of[self] = former

    def _lora_effective(self, name: str) -> Any:
        """W + scaling * B A of the weight of this name, or the weight where nothing adapts it."""
        computed = None if torch.compiler.is_compiling() else _computed.of.get(self)
        key = (name, torch.is_grad_enabled())
        if computed is not None and key in computed:
            return computed[key]
        if not torch.compiler.is_compiling():
            note_run(self)
        state: State = self.__dict__[STATE]
        scales = self.__dict__[SCALES] if torch.compiler.is_compiling() else None
        kind, changes = changes_of(self, state.running, name, scales, drops=True)
        W = bare(self, name)
        own = [W, *(tensor for _, change in changes for tensor in change.tensors.values())]
        if any(t is not None and is_distributed(t) for t in own) and is_of_fsdp(self):
            return W  # FSDP looks for its shards; what a forward reads is gathered
        value: Any = W
        if kind and W is not None:
            require_values(self, W, own[1:])
            # Nothing is known of what others do to it who read it.
            inside = computed is not None or torch.compiler.is_compiling()
            value = (kind.multiplied if inside else kind.effective)(self, W, changes)
        if computed is None:
            return shown(value, W) if isinstance(W, Tensor) and value is not W else value
        computed[key] = value
        return value


def changes_of(
    module: nn.Module, terms: Sequence[Term], weight: str, scales: Scales | None = None,
    drops: bool = False,
) -> tuple[Kind | None, list[tuple[Variant, Change]]]:  # fmt: skip
    """The kind, and the changes that these terms make of the module's weight of this name.

    With the layer's scales, which a compiler takes for inputs, factors are tensors.
    """
    kind: Kind | None = None
    changes: list[tuple[Variant, Change]] = []
    for term in terms:
        if term.spec.weight == weight:
            kind = term.kind
            # Parameters, or what stands in their place for a while (``torch.func``).
            tensors = {role: getattr(module, name) for role, name in term.names.items()}
            factor = term.factor if scales is None else scales[term.adapter][1]
            change = term.change(tensors, factor, dropout_now(module, term) if drops else 0.0)
            changes.append((term.variant, change))
    return kind, changes
