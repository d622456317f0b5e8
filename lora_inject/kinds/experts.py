"""A fused weight with adapters as code sees it: no more of it is computed than is asked for.

A module of which it is known how it multiplies by its weight reads a ``MultipliedWeight``, of which
``x W + s (x A) B`` is computed and nothing of the weight's size is made. All else reads
``ExpertWeights``, of which the experts that are indexed are computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.compat.marks import is_fallback_of_grouped_product
from lora_inject.compat.torch_private import is_grouped_product, tree_map
from lora_inject.kinds.base import Kind
from lora_inject.kinds.bytecode import WRITING
from lora_inject.kinds.shown import shown
from lora_inject.variants import Change, Spec, Variant
from lora_inject.variants.lora import add

Changes = list[tuple[Variant, Change]]
_FACTS = {"shape", "dtype", "device", "ndim", "dim", "size", "is_cuda", "is_cpu", "numel"}


class LazyWeight(ABC):
    """A weight that adapters change, which is computed where a tensor is needed.

    Args:
        W: the weight without adapters.
    """

    def __init__(self, W: Tensor) -> None:
        self._W = W
        self._whole: dict[bool, Tensor] = {}  # by whether gradients are recorded

    @abstractmethod
    def _compute(self) -> Tensor:
        """The effective weight."""

    def _tensor(self) -> Tensor:
        records = torch.is_grad_enabled()
        if records not in self._whole:
            self._whole[records] = self._compute()
        return self._whole[records]

    def __getitem__(self, index: Any) -> Any:
        return self._tensor()[index]

    def __len__(self) -> int:
        return len(self._W)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._W if name in _FACTS or name in WRITING else self._tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_as_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)


def _operator(name: str) -> Any:
    def operator(weight: LazyWeight, *others: Any) -> Any:
        return getattr(weight._tensor(), name)(*map(_as_tensor, others))

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul",
              "rmatmul", "neg", "abs", "lt", "le", "gt", "ge"):  # fmt: skip
    setattr(LazyWeight, f"__{_name}__", _operator(f"__{_name}__"))


def _as_tensor(value: Any) -> Any:
    return value._tensor() if isinstance(value, LazyWeight) else value


class ExpertWeights(LazyWeight):
    """A fused weight with its adapters, of which only what is indexed is computed.

    ``weights[e]`` and ``weights[ids]`` compute the experts they name; anything else that wants a
    tensor gets all of them, computed once.
    """

    def __init__(self, kind: Kind, layer: nn.Module, W: Tensor, changes: Changes) -> None:
        super().__init__(W)
        self._kind, self._layer, self._changes = kind, layer, changes

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple):
            return self._tensor()[index]
        own = [
            (variant, change._replace(tensors={r: t[index] for r, t in change.tensors.items()}))
            for variant, change in self._changes
        ]
        return self._effective(self._W[index], own)

    def _compute(self) -> Tensor:
        return shown(self._effective(self._W, self._changes), self._W)

    def _effective(self, W: Tensor, changes: Changes) -> Tensor:
        return Kind.effective(self._kind, self._layer, W, changes)  # type: ignore[no-any-return]


class Factored(NamedTuple):
    """One change of a weight: ``factor * L R``, in the order in which the weight is read.

    Attributes:
        spec: the pair.
        factor: the scaling times the weight with which the adapter is in use.
        products: L (..., rows, r) and R (..., r, columns), or for each expert one of a list; a
            second product is taken away from the first.
    """

    spec: Spec
    factor: float | Tensor
    products: Sequence[tuple[Any, Any]]

    def each(self, change: Callable[[Any, Any], tuple[Any, Any]]) -> "Factored":
        """The same with other L and R."""
        return self._replace(products=[change(L, R) for L, R in self.products])


class MultipliedWeight(LazyWeight):
    """A weight, or a stack of them, that knows how to be multiplied by tensors.

    Of ``linear``, ``x @ W`` and ``W @ x`` in all their forms, and grouped products, it computes the
    product with W and those with the factors of its changes. ``W[e]``, ``W[ids]`` and transposed
    ones know it too. For anything else it is the effective weight.

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
        value: Tensor = _as_tensor(self._effective())
        return value

    def __getitem__(self, index: Any) -> Any:
        masks = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        if self._W.dim() < 3 or masks or type(index) not in (int, slice, Tensor):
            return self._effective()[index]
        if isinstance(index, Tensor) and index.dim() == 0:
            index = int(index)
        factors = self._experts_apart() if isinstance(index, int) else self._changes
        own = [change.each(lambda L, R: (L[index], R[index])) for change in factors]
        return MultipliedWeight(self._W[index], own, lambda: self._effective()[index])

    def _experts_apart(self) -> list[Factored]:
        """L and R of each expert, made at once: one by one each would have a gradient for all."""
        records = torch.is_grad_enabled()
        if records not in self._apart:
            apart = [c.each(lambda L, R: (L.unbind(), R.unbind())) for c in self._changes]
            self._apart[records] = apart
        return self._apart[records]

    def transpose(self, dim0: int, dim1: int) -> Any:
        """With the last two dimensions exchanged it is one of its kind; else a tensor."""
        dims = self._W.dim()
        if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
            return self._tensor().transpose(dim0, dim1)
        own = [change.each(lambda L, R: (R.mT, L.mT)) for change in self._changes]
        return MultipliedWeight(self._W.mT, own, lambda: _as_tensor(self._effective()).mT)

    def t(self) -> Any:
        """The transpose of a matrix."""
        return self.transpose(0, 1) if self._W.dim() == 2 else self._tensor().t()

    mT = property(lambda self: self.transpose(-2, -1))  # noqa: N815 (torch's name)
    T = property(lambda self: self.t() if self._W.dim() == 2 else self._tensor().T)

    def __matmul__(self, x: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (self, x))

    def __rmatmul__(self, x: Any) -> Any:
        return self.__torch_function__(torch.matmul, (), (x, self))

    def _add(self, x: Tensor, y: Tensor, product: Any, swapped: bool) -> Tensor:
        """y, the product of x and W, with those of x and the changes.

        Args:
            x: the other factor.
            y: the product with W.
            product: computes one of an x and a matrix, or a stack.
            swapped: whether R comes to the input before L.
        """
        for change in self._changes:
            made = []
            for L, R in change.products:
                first, second = (R, L) if swapped else (L, R)
                h = product(x, first.to(x.dtype))
                made.append(product(h, second.to(h.dtype)))
            delta = made[0] - made[1] if made[1:] else made[0]
            y = add(y, delta, change.factor, change.spec)
        return y

    def _padded(self) -> "MultipliedWeight":
        """With a rank that has rows of whole 16 bytes, as grouped products ask for."""

        def padded(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
            more = -L.shape[-1] % (16 // L.element_size())
            return (F.pad(L, (0, more)), F.pad(R, (0, 0, 0, more))) if more else (L, R)

        own = [change.each(padded) for change in self._changes]
        return MultipliedWeight(self._W, own, self._effective)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, weight = args[:2] if len(args) > 1 else (None, None)
        rest, kwargs = args[2:], kwargs or {}
        if isinstance(weight, MultipliedWeight) and isinstance(x, Tensor):
            if func is F.linear and weight._W.dim() == 2:
                return weight._add(x, func(x, weight._W, *rest, **kwargs), func, swapped=True)
            grouped = is_grouped_product(func) or is_fallback_of_grouped_product(func)
            if grouped and x.dim() == 2 and weight._W.dim() == 3:
                y = func(x, weight._W, *rest, **kwargs)
                ends = {"offs": rest[0] if rest else kwargs["offs"]}
                product = lambda x, M: func(x, M, **ends)  # noqa: E731
                return weight._padded()._add(x, y, product, swapped=False)
        if func in _PRODUCTS and not rest and not kwargs:
            if isinstance(weight, MultipliedWeight) and isinstance(x, Tensor):
                return weight._add(x, func(x, weight._W), func, swapped=False)
            if isinstance(x, MultipliedWeight) and isinstance(weight, Tensor):
                product = lambda x, M: func(M, x)  # noqa: E731
                return x._add(weight, func(x._W, weight), product, swapped=True)
        return super().__torch_function__(func, types, args, kwargs)


_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm,
             Tensor.__matmul__}  # fmt: skip


def multiplied(kind: Kind, layer: nn.Module, W: Tensor, changes: Changes) -> MultipliedWeight:
    """A weight that knows how to be multiplied; all of its changes are products ``B A``."""
    own = []
    for variant, change in changes:
        pairs = variant.products(kind, layer, change.tensors)
        cast = [(A.to(W.dtype), B.to(W.dtype)) for A, B in pairs]
        products = [(A.mT, B.mT) if kind.transposes else (B, A) for A, B in cast]
        own.append(Factored(change.spec, change.factor, products))
    whole = ExpertWeights(kind, layer, W, changes)
    return MultipliedWeight(W, own, lambda: whole)
