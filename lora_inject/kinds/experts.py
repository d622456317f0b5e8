"""A fused weight with adapters as code sees it: no more of it is computed than is asked for.

Of ``ExpertWeights`` the experts that are indexed are computed. Where it is known how a module
multiplies by a weight, fused or not, it reads a ``MultipliedWeight`` instead (``multiplied.py``).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.compat.torch_private import tree_map
from lora_inject.kinds.base import Changes, Kind
from lora_inject.kinds.bytecode import WRITING
from lora_inject.kinds.shown import shown

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
        args, kwargs = tree_map(as_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)


def _operator(name: str) -> Any:
    def operator(weight: LazyWeight, *others: Any) -> Any:
        return getattr(weight._tensor(), name)(*map(as_tensor, others))

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul",
              "rmatmul", "neg", "abs", "lt", "le", "gt", "ge"):  # fmt: skip
    setattr(LazyWeight, f"__{_name}__", _operator(f"__{_name}__"))


def as_tensor(value: Any) -> Any:
    """The effective weight in place of a lazy one, and anything else as it is."""
    return value._tensor() if isinstance(value, LazyWeight) else value


def any_answers_itself(inputs: Iterable[Any]) -> bool:
    """Whether torch asks one of these what a function does before it asks a lazy weight.

    Jagged tensors, for one, know of no weights but tensors.
    """
    return any(
        getattr(type(x).__torch_function__, "__func__", None) not in _TORCHS
        for x in inputs
        if isinstance(x, Tensor) and type(x) is not Tensor
    )


# Of subclasses without a function of their own.
_TORCHS = (Tensor.__torch_function__.__func__, None)  # type: ignore[attr-defined]


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
