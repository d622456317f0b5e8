"""Every private name of torch that this library uses, and what it does where torch has it no more.

Nothing depends on one of them for what is true: where a name is gone the library takes the slower
way that is always right. (Names that a kind of layer is made of, such as ``_flat_weights`` of
``nn.LSTM``, stand with that kind.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def _named(path: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """What stands under a dotted name in torch, or what takes its place."""
    found: Any = torch
    for part in path.split("."):
        found = getattr(found, part, None)
    return otherwise if found is None else found


def _yes(*_: object) -> bool:
    return True


def _no(*_: object) -> bool:
    return False


# Without these: every tensor counts as watched, and the composed way runs.
_is_functorch_active = _named("_C._are_functorch_transforms_active", _yes)
_count_dispatch_modes = _named("_C._len_torch_dispatch_stack", _yes)
_is_tracing = _named("_C._is_tracing", _yes)
_is_legacy_batched = _named("_C._functorch.is_legacy_batchedtensor", _yes)
# Without this: every device is asked whether it has autocast on.
is_autocast_anywhere = _named("_C._is_any_autocast_enabled", _yes)
# Without this: tensors inside of torch.func count as ordinary ones, of which capacity says that it
# cannot follow them.
is_functorch_wrapped = _named("_C._functorch.is_functorch_wrapped_tensor", _no)
# Without this: no tensor is known again, and layers that read one each have sums of their own.
_weak_reference = _named("utils.weak.TensorWeakRef", lambda _: lambda: None)
# Without this: an output is a view of the product, which allows a little less to be done with it.
unsafe_view = _named("ops.aten._unsafe_view.default", Tensor.view)


def _map_containers(function: Callable[[Any], Any], tree: Any) -> Any:
    """Nested tuples, lists and dictionaries with a function's results in place of what they hold.

    It stands for torch's own, which knows further containers.
    """
    if isinstance(tree, dict):
        return {key: _map_containers(function, value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [_map_containers(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return function(tree)


tree_map = _named("utils._pytree.tree_map", _map_containers)


def tree_leaves(tree: Any) -> list[Any]:
    """What stands in nested containers."""
    leaves: list[Any] = []
    tree_map(leaves.append, tree)
    return leaves


def is_transformed() -> bool:
    """Whether operations are traced, batched or watched, rather than just carried out.

    A compiler fuses the composed way by itself, ``torch.func`` cannot always write in place, and a
    dispatch mode may keep what an operation returned (selective checkpointing does).
    """
    return bool(
        is_compiling() or _is_functorch_active() or _count_dispatch_modes() > 0 or _is_tracing()
    )


def is_batched(value: Tensor) -> bool:
    """Whether operations on this are batched, by ``torch.func.vmap`` or ``is_grads_batched``."""
    return bool(_is_functorch_active() or _is_legacy_batched(value))


def is_forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken; yes where torch does not say."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_instructions(name: str, otherwise: bool) -> bool:
    """Whether the CPU has some instructions, such as ``"avx512_bf16"``.

    Args:
        name: of the instructions.
        otherwise: the answer where torch cannot say.
    """
    return bool(_named(f"cpu._is_{name}_supported", lambda: otherwise)())


def offset_of_shard(shape: Any, mesh: Any, placements: Any) -> tuple[int, ...] | None:
    """Where this rank's part of a DTensor begins in the whole one; None where torch does not say.

    The whole tensor is gathered then.
    """
    try:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    except ImportError:
        return None
    return tuple(compute_local_shape_and_global_offset(shape, mesh, placements)[1])


class Seen:
    """A tensor as it was when it was seen, without keeping it alive."""

    def __init__(self, tensor: Tensor) -> None:
        # What is written into tensors of inference mode is not counted: they are not known again.
        counted = not tensor.is_inference()
        self._weak = _weak_reference(tensor) if counted else lambda: None
        self._version = tensor._version if counted else 0

    def is_now(self, tensor: Tensor) -> bool:
        """Whether this is the very tensor, and nothing has been written into it since."""
        return self._weak() is tensor and self._version == tensor._version

    @property
    def is_gone(self) -> bool:
        """Whether nobody can show the tensor any more."""
        return self._weak() is None
