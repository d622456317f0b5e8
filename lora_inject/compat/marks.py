"""What other libraries leave on modules and tensors, and how this library reads it.

None of these names is promised by anyone. Where one is gone, what is said here of a module is what
is said of one without the mark: nothing then works differently but with the library whose mark it
is, and the tests with that library say so.
"""

from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

# Wrappers of a whole model or of a block, which put their own name into every path below them.
WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
WRAPPED_PREFIXES = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "module.")
WRAPPED_INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

_CHECKPOINTING = "gradient_checkpointing"


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate has hooked the module: it moves its tensors around a forward pass."""
    return "_hf_hook" in module.__dict__


def kept_forwards(module: nn.Module) -> dict[str, MethodType]:
    """The forward methods of its class that accelerate's hooks keep on the module, by attribute."""
    kept = {name: module.__dict__.get(name) for name in ("_old_forward", "forward")}
    own = type(module).forward
    return {
        name: method
        for name, method in kept.items()
        if method is not None and getattr(method, "__func__", None) is own
    }


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP manages the module's parameters, by ``fully_shard`` or the FSDP1 wrapper."""
    # Both leave this mark, which torch.compile reads.
    return bool(_attribute(module, "_is_fsdp_managed_module"))


def zero_shape(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape of the whole parameter that DeepSpeed's ZeRO-3 has partitioned; None of another."""
    shape = getattr(tensor, "ds_shape", None)
    return None if shape is None else tuple(shape)


def checkpointing_switch(module: nn.Module) -> Any:
    """The switch by which transformers and diffusers checkpoint a module: a bool where it is."""
    return _attribute(module, _CHECKPOINTING)


def may_be_reentrant(module: nn.Module) -> bool:
    """Whether a module that is checkpointed may be so in the reentrant form."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    known = function.keywords if isinstance(function, partial) else {}
    return bool(known.get("use_reentrant", True))


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model of transformers has an encoder and a decoder, each with its own tokens."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _attribute(module: nn.Module, name: str) -> Any:
    """``getattr``, which is slow for what a module has not; of a model every module is asked."""
    own = module.__dict__
    return own[name] if name in own else getattr(type(module), name, None)
