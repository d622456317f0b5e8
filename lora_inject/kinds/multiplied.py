"""A weight that knows how to be multiplied: ``x W + s (x A) B``, and no ``W + s B A``.

Nothing of the weight's size is made or kept for it. Dropout acts on x, in each of its products.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.arithmetic.grouped import grouped_change, may_be_one_function, padded
from lora_inject.arithmetic.linear import adapted_linear, may_run_whole
from lora_inject.compat.marks import is_fallback_of_grouped_product
from lora_inject.compat.torch_private import is_grouped_product
from lora_inject.errors import LoRAInjectError
from lora_inject.kinds.base import Changes, Kind
from lora_inject.kinds.experts import ExpertWeights, LazyWeight, as_tensor
from lora_inject.kinds.projections import of_attention
from lora_inject.sharding import is_distributed
from lora_inject.variants import Spec
from lora_inject.variants.lora import add


class Factored(NamedTuple):
    """One change of a weight: ``factor * L R``, in the order in which the weight is read.

    Attributes:
        spec: the pair.
        factor: the scaling times the weight with which the adapter is in use.
        products: L (..., rows, r) and R (..., r, columns), or for each expert one of a list; a
            second product is taken away from the first.
        dropout: the probability with which what is multiplied by L R is dropped out.
    """

    spec: Spec
    factor: float | Tensor
    products: Sequence[tuple[Any, Any]]
    dropout: float

    def each(self, change: Callable[[Any, Any], tuple[Any, Any]]) -> "Factored":
        """The same with other L and R."""
        return self._replace(products=[change(L, R) for L, R in self.products])


class MultipliedWeight(LazyWeight):
    """A weight, or a stack of them, that knows how to be multiplied by tensors.

    Of ``linear``, ``x @ W`` and ``W @ x`` in all their forms, grouped products and the projections
    of attention, it computes the product with W and those with the factors of its changes.
    ``W[e]``, ``W[ids]``, parts and transposed ones know it too. For anything else it is the
    effective weight.

    Args:
        W: the weight without adapters, (..., rows, columns).
        changes: what is added to it.
        effective: what computes the effective weight, or what of it is indexed.
    """

    def __init__(
        self, W: Tensor, changes: Sequence[Factored], effective: Callable[[], Any]
    ) -> None:
        super().__init__(W)
        self._changes, self._effective = changes, effective
        self._apart: dict[bool, list[Factored]] = {}  # by whether gradients are recorded

    def _compute(self) -> Tensor:
        value: Tensor = as_tensor(self._effective())
        return value

    def __getitem__(self, index: Any) -> Any:
        masks = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        if self._W.dim() < 3 or masks or type(index) not in (int, slice, Tensor):
            whole = self._effective()
            return whole[index] if self._W.dim() > 2 else as_tensor(whole)[index]
        if isinstance(index, Tensor) and index.dim() == 0:
            index = int(index)
        factors = self._experts_apart() if isinstance(index, int) else self._cast()
        own = [change.each(lambda L, R: (L[index], R[index])) for change in factors]
        return MultipliedWeight(self._W[index], own, lambda: self._effective()[index])

    def _experts_apart(self) -> list[Factored]:
        """L and R of each expert, made at once: one by one each would have a gradient for all."""
        records = torch.is_grad_enabled()
        if records not in self._apart:
            apart = [c.each(lambda L, R: (L.unbind(), R.unbind())) for c in self._cast()]
            self._apart[records] = apart
        return self._apart[records]

    def _cast(self) -> list[Factored]:
        """L and R in the dtype of the weight, which is mostly that of what is multiplied by it."""
        dtype = self._W.dtype
        return [c.each(lambda L, R: (L.to(dtype), R.to(dtype))) for c in self._changes]

    def transpose(self, dim0: int, dim1: int) -> Any:
        """With the last two dimensions exchanged it is one of its kind; else a tensor."""
        dims = self._W.dim()
        if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
            return self._tensor().transpose(dim0, dim1)
        own = [change.each(lambda L, R: (R.mT, L.mT)) for change in self._changes]
        return MultipliedWeight(self._W.mT, own, lambda: as_tensor(self._effective()).mT)

    def chunk(self, chunks: int, dim: int = 0) -> Any:
        """Parts with equally many rows each; along other dimensions they are tensors."""
        return self._parted(lambda t: torch.chunk(t, chunks, dim), dim)

    def split(self, sizes: int | list[int], dim: int = 0) -> Any:
        """Parts of these sizes."""
        return self._parted(lambda t: torch.split(t, sizes, dim), dim)

    def _parted(self, parts: Callable[[Tensor], Sequence[Tensor]], dim: int) -> Sequence[Any]:
        if dim or self._W.dim() != 2:
            return parts(self._tensor())
        apart = [c.each(lambda L, R: (parts(L), R)) for c in self._changes]

        def part(i: int, W: Tensor) -> MultipliedWeight:
            own = [change.each(lambda L, R: (L[i], R)) for change in apart]
            return MultipliedWeight(W, own, lambda: parts(self._tensor())[i])

        return [part(i, W) for i, W in enumerate(parts(self._W))]

    def t(self) -> Any:
        """The transpose of a matrix."""
        return self.transpose(0, 1) if self._W.dim() == 2 else self._tensor().t()

    mT = property(lambda self: self.transpose(-2, -1))  # noqa: N815 (torch's name)
    T = property(lambda self: self.t() if self._W.dim() == 2 else self._tensor().T)

    def __matmul__(self, x: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (self, x))

    def __rmatmul__(self, x: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (x, self))

    def _linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``linear`` with a matrix; the first changes that are a ``B A`` in one Function with it.

        The rest is added to that, so that an adapter that comes later changes nothing before it.
        """
        if x.dim() == 3:  # torch multiplies strided inputs one by one by a weight that is frozen
            x = x.contiguous()
        first = list(takewhile(lambda c: len(c.products) == 1 and not c.dropout, self._changes))
        branches = [(R, L, cast(float, c.factor), 0.0, None)
                    for c in first for L, R in c.products]  # fmt: skip
        if not (branches and may_run_whole(x, self._W, branches)):
            return self._add(x, F.linear(x, self._W, bias), F.linear, swapped=True)
        y = adapted_linear(x, self._W, bias, branches)
        return self._add(x, y, F.linear, swapped=True, done=len(first))

    def _add(self, x: Tensor, y: Tensor, product: Any, swapped: bool, done: int = 0) -> Tensor:
        """y, the product of x and W, with those of x and the changes.

        Args:
            x: the other factor.
            y: the product with W.
            product: computes one of an x and a matrix, or a stack.
            swapped: whether R comes to the input before L.
            done: how many changes y has already.
        """

        def times(x: Tensor, L: Tensor, R: Tensor) -> Tensor:
            first, second = (R, L) if swapped else (L, R)
            h = product(x, first.to(x.dtype))
            return cast(Tensor, product(h, second.to(h.dtype)))

        return self._added(x, y, times, self._changes[done:])

    def _add_by_group(self, x: Tensor, y: Tensor, product: Any, ends: Tensor) -> Tensor:
        """The same for rows that are sorted by group, whose last ones are at these ends."""
        factors = [t for change in self._changes for pair in change.products for t in pair]
        if is_grouped_product(product) and may_be_one_function(x, factors):
            times = lambda x, L, R: grouped_change(x, L, R, ends, product)  # noqa: E731
            return self._added(x, y, times, self._changes, in_place=True)

        def composed(x: Tensor, L: Tensor, R: Tensor) -> Tensor:
            L, R = padded(L.to(x.dtype), R.to(x.dtype))
            return cast(Tensor, product(product(x, L, offs=ends), R, offs=ends))

        return self._added(x, y, composed, self._changes)

    @staticmethod
    def _added(
        x: Tensor, y: Tensor, times: Callable[..., Tensor], changes: Sequence[Factored],
        in_place: bool = False,
    ) -> Tensor:  # fmt: skip
        """An output with what ``times`` makes of x, an L and an R; in place where y is new."""
        for change in changes:
            seen = F.dropout(x, change.dropout) if change.dropout else x
            made = [times(seen, L, R) for L, R in change.products]
            delta = made[0] - made[1] if made[1:] else made[0]
            if in_place:
                y.add_(delta, alpha=cast(float, change.factor))
            else:
                y = add(y, delta, change.factor, change.spec)
        return y

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, weight = args[:2] if len(args) > 1 else (None, None)
        rest, kwargs = args[2:], kwargs or {}
        if isinstance(weight, MultipliedWeight) and isinstance(x, Tensor):
            if func is F.linear and weight._W.dim() == 2:
                return weight._linear(x, *rest, **kwargs)
            grouped = is_grouped_product(func) or is_fallback_of_grouped_product(func)
            if grouped and x.dim() == 2 and weight._W.dim() == 3:
                y = func(x, weight._W, *rest, **kwargs)
                return weight._add_by_group(x, y, func, rest[0] if rest else kwargs["offs"])
        if func is F.multi_head_attention_forward:
            return of_attention(func, args, kwargs, MultipliedWeight)
        if func in _PRODUCTS and not rest and not kwargs:
            if isinstance(weight, MultipliedWeight) and isinstance(x, Tensor):
                return weight._add(x, func(x, weight._W), func, swapped=False)
            if isinstance(x, MultipliedWeight) and isinstance(weight, Tensor):
                product = lambda x, M: func(M, x)  # noqa: E731
                return x._add(weight, func(x._W, weight), product, swapped=True)
        return super().__torch_function__(func, types, args, kwargs)


_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm,
             Tensor.__matmul__}  # fmt: skip


def multiplied(kind: Kind, layer: nn.Module, W: Tensor, changes: Changes) -> Any:
    """A weight that knows how to be multiplied, where it is known that this is enough.

    Then all of its changes are products ``B A``; else it is the effective weight.
    """
    if torch.compiler.is_compiling() and not kind.compiles_products(layer, W.dtype):
        return kind.effective(layer, W, changes)
    known = all(kind.multiplies(layer, [change.spec], variant) for variant, change in changes)
    tensors = [W, *(t for _, change in changes for t in change.tensors.values())]
    if not known or any(map(is_distributed, tensors)):
        return kind.effective(layer, W, changes)
    own = []
    for variant, change in changes:
        pairs = variant.products(kind, layer, change.tensors)
        products = [(A.mT, B.mT) if kind.transposes else (B, A) for A, B in pairs]
        own.append(Factored(change.spec, change.factor, products, change.dropout))
    whole = ExpertWeights(kind, layer, W, changes)

    def effective() -> ExpertWeights:
        require_no_dropout(layer, changes)
        return whole

    return MultipliedWeight(W, own, effective)


def require_no_dropout(layer: Any, changes: Changes) -> None:
    """Where W + s B A is to be made.

    Raises:
        LoRAInjectError: dropout is in force, and acts on what is multiplied by a change.
    """
    for _, change in changes:
        if change.dropout:
            raise LoRAInjectError(
                f"{change.spec.weight} is read here, and not just multiplied by in a way that can "
                f"be followed, and dropout={change.dropout:g} acts on what it multiplies.",
                path=layer.lora_adapters[0].path,
                remedy="Use dropout 0, or another experts_implementation (transformers'), or leave "
                "the experts out of torch.compile; eval() has no dropout.",
            )
