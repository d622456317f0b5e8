"""Every private name of torch that this library uses, and what it does where torch has it no more.

Nothing depends on one of them for what is true: where a name is gone the library takes the slower
way that is always right. (Names that a kind of layer is made of stand with that kind.)
"""

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils import checkpoint


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
# Without this: no call of a module is seen on the stack.
_call_of_module = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)
# Without this: every device is asked whether it has autocast on.
is_autocast_anywhere = _named("_C._is_any_autocast_enabled", _yes)
# Without this: tensors inside of torch.func count as ordinary ones, which capacity cannot follow.
is_functorch_wrapped = _named("_C._functorch.is_functorch_wrapped_tensor", _no)
# Without this: no tensor is known again, and layers that read one each have sums of their own.
_weak_reference = _named("utils.weak.TensorWeakRef", lambda _: lambda: None)
# Without this: an output is a view of the product, which allows a little less to be done with it.
unsafe_view = _named("ops.aten._unsafe_view.default", Tensor.view)
# Without this: attention sees an effective weight, and makes queries, keys and values of that.
packed_projections = getattr(F, "_in_projection_packed", None)
# Without these: every forward asks whether it runs in a checkpointed part, and products are kept.
_hooks_of_saved_tensors = _named("_C._autograd._top_saved_tensors_default_hooks", _yes)
_number_of_backward_pass = _named("_C._current_graph_task_id", lambda: 0)
# Without this: no product is kept as its factors, and capacity counts none so.
tells_of_hooks = hasattr(_named("_C._autograd.SavedTensor", object), "unpack_hook")


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
    watched = is_compiling() or _is_functorch_active() or _count_dispatch_modes() > 0
    return bool(watched or _is_tracing())


def wants_parameter(reader: FrameType) -> bool:
    """Whether it is one of torch's functions that reads a weight for the sake of the Parameter.

    Pruning, weight_norm and FSDP1 put what they make of it in its place before each forward pass.
    """
    module, name = reader.f_globals.get("__name__"), reader.f_code.co_name
    return module in _TAKING or (name == "get_parameter" and module == "torch.nn.modules.module")


def replaces_weights(reader: FrameType) -> bool:
    """Whether it is a function that makes something else of the weight that it reads, for good."""
    module = str(reader.f_globals.get("__name__"))
    return module in _REPLACING or module.startswith("torchao.")


_TAKING = {"torch.nn.utils.prune", "torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm",
           "torch.distributed.fsdp._flat_param"}  # fmt: skip
_REPLACING = {"torch.nn.utils.parametrize", "torch.nn.utils.fusion"}


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


def is_grouped_product(function: Any) -> bool:
    """Whether it is torch's product of rows, by groups, with a matrix for each group.

    The public one calls the private one, which older versions have alone; where neither is known,
    such a product sees the effective weight.
    """
    return function in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))


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


def may_be_checkpointed() -> bool:
    """Whether what runs now with gradients may be part of a checkpoint: fast, and mostly not."""
    return _hooks_of_saved_tensors(True) is not None or _number_of_backward_pass() != -1


def factors_kept(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Two tensors that autograd keeps as they are and whose elementwise product x is, or its view.

    None where it keeps none, or not as they are: hooks (checkpointing, offloading) stand between,
    and asking would run them. None too where torch does not say whether hooks do.
    """
    node: Any = x.grad_fn
    while node is not None and node.name() == "ViewBackward0":
        node = node.next_functions[0][0]
    if node is None or node.name() != "MulBackward0":
        return None
    if x._version or _hooks_of_saved_tensors(True) is not None:  # written to since, or hooked
        return None
    left, right = _kept_by(node, "self"), _kept_by(node, "other")
    if left is None or right is None or left.shape != right.shape:
        return None
    same = left.dtype == right.dtype == x.dtype and left.device == right.device == x.device
    return (left, right) if same else None


def _kept_by(node: Any, name: str) -> Tensor | None:
    """What a node of the graph keeps under a name, if it does so as a plain tensor."""
    try:  # raises where it is kept no more, or has been written to
        if not _is_kept_as_it_is(getattr(node, f"_raw_saved_{name}", None)):
            return None
        kept = getattr(node, f"_saved_{name}")
    except RuntimeError:
        return None
    return kept.detach() if type(kept) in (Tensor, nn.Parameter) else None


def _is_kept_as_it_is(raw: Any) -> bool:
    """Whether what autograd holds is a tensor without hooks; no where torch does not say."""
    hook = getattr(raw, "unpack_hook", raw)
    return hook is None and getattr(raw, "data", None) is not None


def keep_instead(node: Any, make: Callable[[], Tensor]) -> None:
    """Let a Function that keeps a tensor as its first one make it again instead.

    It stays the tensor that it was to autograd. Where torch gives no access, it is kept.
    """
    first: Any = next(iter(getattr(node, "_raw_saved_tensors", ())), None)
    if _is_kept_as_it_is(first):
        first.register_hooks(lambda _: None, lambda _: make())


def reduced_parameters(wrapper: nn.parallel.DistributedDataParallel) -> list[Tensor]:
    """The parameters whose gradients it reduces; where torch does not say, all of the model's."""
    buckets = getattr(wrapper.reducer, "_get_zeros_like_grad_buckets", None)
    if buckets is None:
        return list(wrapper.parameters())
    return [tensor for bucket in buckets() for tensor in bucket.parameters()]


def hooks_after_accumulation(parameter: Tensor) -> dict[int, Any]:
    """The hooks that run when a gradient has been accumulated; where torch does not say, none."""
    return getattr(parameter, "_post_accumulate_grad_hooks", None) or {}


def calls_on_stack(module: nn.Module) -> int:
    """How many calls of a module with hooks run now."""
    calls, frame = 0, sys._getframe(1)
    while (above := frame.f_back) is not None:
        calls += above.f_code is _call_of_module and above.f_locals.get("self") is module
        frame = above
    return calls


def is_call_of_module(frame: FrameType) -> bool:
    """Whether a module is called there, whose forward runs above it."""
    return frame.f_code is _call_of_module


def is_removing_parametrizations() -> bool:
    """Whether the caller's caller is torch's ``remove_parametrizations``, or what it asks first."""
    caller = sys._getframe(2)
    codes = {caller.f_code, caller.f_back.f_code if caller.f_back else None}
    return parametrize.remove_parametrizations.__code__ in codes


class CheckpointedPart:
    """A call of ``torch.utils.checkpoint.checkpoint`` that runs now.

    Args:
        owner: what keeps the function that will be called to run it again.
        name: of the attribute under which it does.
        runs_again: whether this is such a call, in a backward pass.
    """

    def __init__(self, owner: Any, name: str, runs_again: bool) -> None:
        self._owner, self._name, self.runs_again = owner, name, runs_again

    @property
    def function(self) -> Any:
        """The function that is called to run it again."""
        return getattr(self._owner, self._name)

    @function.setter
    def function(self, value: Any) -> None:
        setattr(self._owner, self._name, value)


def checkpointed_parts() -> Iterator[CheckpointedPart]:
    """The calls of torch's checkpoint, in both forms, that are on the stack, the inmost first.

    They are known by local variables of torch's functions; where these have other names, none are.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            own = frame.f_locals
            if hasattr(own.get("ctx"), "run_function"):
                again = frame.f_code.co_name == "backward"
                yield CheckpointedPart(own["ctx"], "run_function", again)
            else:
                generator = getattr(own.get("gen"), "gi_frame", None)
                begun = generator.f_locals.get("new_frame") if generator else None
                part = own.get("frame") if begun is None else begun
                if hasattr(part, "recompute_fn"):
                    yield CheckpointedPart(part, "recompute_fn", begun is None)
        frame = frame.f_back
