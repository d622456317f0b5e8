"""The kinds of layer that can be adapted, and the registry that holds them.

A kind says which modules it is for, the shapes of A and B, their starting values, what it refuses,
and what the adapter adds to the layer's output or weight. ``register_kind`` adds one.
"""

from torch import nn

from lora_inject.errors import ArgumentError
from lora_inject.kinds.attention import MultiheadAttentionKind
from lora_inject.kinds.base import Kind
from lora_inject.kinds.conv1d import Conv1DKind
from lora_inject.kinds.convolution import ConvKind, ConvTransposeKind
from lora_inject.kinds.embedding import EmbeddingKind
from lora_inject.kinds.grouped_linear import GroupedLinearKind
from lora_inject.kinds.linear import LinearKind
from lora_inject.kinds.quantized import QuantizedLinearKind
from lora_inject.kinds.recurrent import RecurrentCellKind, RecurrentKind
from lora_inject.variants import Spec

__all__ = ["Kind", "Spec", "find_kind", "register_kind"]

_registry: list[Kind] = [
    GroupedLinearKind(),
    LinearKind(),
    Conv1DKind(),
    QuantizedLinearKind(),
    EmbeddingKind(),
    ConvKind(),
    ConvTransposeKind(),
    MultiheadAttentionKind(),
    RecurrentKind(),
    RecurrentCellKind(),
]


def register_kind(kind: Kind) -> None:
    """Add a kind of layer; it is asked before those that are already there.

    Example:
        >>> class PatchKind(Kind):
        ...     name = "Patch"
        ...
        ...     def matches(self, module):
        ...         return isinstance(module, Patch)
        ...
        ...     def specs(self, module, settings):
        ...         return (Spec("weight", 4, 6, (settings.r, 4), (6, settings.r)),)
        ...
        ...     def down(self, layer, x, y, A, dropout):
        ...         return x @ A.T
        ...
        ...     def up(self, layer, x, h, B):
        ...         return h @ B.T
        >>> register_kind(PatchKind())  # doctest: +SKIP

    Args:
        kind: an instance of a class that can be imported, since adapted models that are pickled
            refer to it by name.

    Raises:
        ArgumentError: it is not an instance of ``Kind``.
    """
    if not isinstance(kind, Kind):
        raise ArgumentError(f"kind must be an instance of Kind, not {kind!r}.")
    _registry.insert(0, kind)


def find_kind(module: nn.Module) -> Kind | None:
    """The kind that is for this module, or None where there is none."""
    return next((kind for kind in _registry if kind.matches(module)), None)
