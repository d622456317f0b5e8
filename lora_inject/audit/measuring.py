"""How much adapters add to what a layer returns, measured on the layer as it is called."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.compat.torch_private import is_functorch_wrapped, tree_leaves
from lora_inject.core.class_swap import place_of_input
from lora_inject.core.state import State
from lora_inject.own import STATE
from lora_inject.sharding import is_distributed

_ROWS = 256  # of an input, of which ranks are taken
# From which share of the largest singular value on a direction counts: of an input, where it is
# plain; of what A makes of it, where it is no rounding. What lies between is no fault of A.
_PLAIN, _NO_ROUNDING = 1e-2, 1e-5


class Sizes:
    """Sums over the calls of a layer.

    Attributes:
        added: the squared norm of what its adapters add; None where it was not measured.
        output: that of what the layer returns without them.
        ranks: by adapter, how many directions A made of an input and how many it could have.
    """

    def __init__(self) -> None:
        self.added: Tensor | None = None
        self.output: Tensor | None = None
        self.ranks: dict[str, tuple[int, int]] = {}

    @property
    def ratio(self) -> float | None:
        """``||delta|| / ||y||``; None where it was not measured."""
        if self.added is None or self.output is None:
            return None
        return float((self.added / self.output.clamp(min=torch.finfo(torch.float32).tiny)).sqrt())


def measure(
    sizes: Sizes, layer: nn.Module, state: State, args: Any, kwargs: Any, output: Any
) -> None:
    """Add one call to the sums: the layer is computed once more, without its adapters.

    Not of layers whose values are on several ranks.
    """
    made = next(tensors_in(output), None)
    own = [p for p in layer._parameters.values() if p is not None]
    if made is None or not state.running or any(map(is_distributed, (made, *own))):
        return
    layer.__dict__[STATE] = state.change(use=state.use._replace(weights={}))
    try:
        bare = next(tensors_in(layer.forward(*args, **kwargs)), None)
    finally:
        layer.__dict__[STATE] = state
    if bare is not None and bare.shape == made.shape:
        y, delta = bare.float(), made.float() - bare.float()
        sizes.added = delta.square().sum() + (0 if sizes.added is None else sizes.added)
        sizes.output = y.square().sum() + (0 if sizes.output is None else sizes.output)
    _take_ranks(sizes, layer, state, args, kwargs, made)


def _take_ranks(
    sizes: Sizes, layer: nn.Module, state: State, args: Any, kwargs: Any, y: Tensor
) -> None:
    at, name = place_of_input(state.before.cls)
    x = args[at] if len(args) > at else kwargs.get(name)
    for term in state.running:
        kind = term.kind
        known = term.plain and kind.zero == "B" and kind.rows_refusal(layer) is None
        if not known or not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        tensors = {role: layer.get_parameter(name) for role, name in term.names.items()}
        change = term.change(tensors, term.factor)
        A, B = change.tensors["A"], change.tensors["B"]
        A_RI = kind.to_matrices(layer, A, B)[0].float()
        x_NI = kind.input_rows(layer, x, y).reshape(-1, A_RI.shape[-1])[:_ROWS].float()
        if A_RI.dim() != 2 or not len(x_NI):
            continue
        used, most = _rank(x_NI @ A_RI.mT, _NO_ROUNDING), min(len(A_RI), len(x_NI))
        if used < most:
            most = min(most, _rank(x_NI, _PLAIN))
        former = sizes.ranks.get(term.adapter, (0, 0))
        sizes.ranks[term.adapter] = max(former, (used, most))


def _rank(matrix: Tensor, share: float) -> int:
    """How many singular values are above a share of the largest; 0 of what is not finite."""
    values: Any = torch.linalg.svdvals(matrix.nan_to_num(0.0, 0.0, 0.0))
    return int((values > share * values[:1]).sum())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of what a module returns, that are dense and of no transform."""
    for leaf in [value] if isinstance(value, Tensor) else tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize > 1:
            dense = leaf.layout is torch.strided and not leaf.is_meta
            if dense and not is_functorch_wrapped(leaf):
                yield leaf
