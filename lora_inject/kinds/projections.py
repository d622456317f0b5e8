"""The projections of attention by a packed weight that knows how to be multiplied.

torch's function for attention asks its packed weight first of all whether it is a plain tensor, and
multiplies by it only then. So the products are made before, by torch's own function for them, and
attention gets them with weights that leave them as they are.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_inject.compat.torch_private import packed_projections
from lora_inject.kinds.experts import as_tensor

_NAMES = ("query", "key", "value")


class _Made:
    """The weight of a projection that is made: multiplied by it, anything stays as it is."""

    def __init__(self, features: int) -> None:
        self.shape = torch.Size((features, features))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]


def of_attention(
    attention: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], known: type
) -> Any:
    """What attention computes where its packed weight, or another one, is lazy.

    Args:
        attention: ``F.multi_head_attention_forward``.
        args: what it is given.
        kwargs: the same, by name.
        known: the class of weights that know how to be multiplied.
    """
    given = inspect.signature(attention).bind(*args, **kwargs).arguments
    weight = given["in_proj_weight"]
    if packed_projections is not None and isinstance(weight, known):
        made = packed_projections(*map(given.get, _NAMES), weight, given["in_proj_bias"])
        for name, x in zip(_NAMES, made, strict=True):
            given |= {name: x, f"{name[0]}_proj_weight": _Made(x.shape[-1])}
        given |= {"in_proj_weight": None, "use_separate_proj_weight": True}
    # Attention multiplies by weights of one projection each whatever they are.
    apart = {f"{name[0]}_proj_weight" for name in _NAMES}
    return attention(**{n: v if n in apart else as_tensor(v) for n, v in given.items()})
