"""Why a module or a weight of any kind cannot be adapted."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_inject.compat.marks import has_accelerate_hook, is_fully_sharded
from lora_inject.kinds.base import Way, is_plain
from lora_inject.sharding import has_known_placements, is_distributed, is_placeholder
from lora_inject.variants import Spec

LAZY = "it is lazy and has no shape yet. Run one forward pass first."


def lazy_refusal(module: nn.Module) -> str | None:
    """Why nothing can be asked of a module's tensors yet, with the remedy; else None."""
    return LAZY if any(p is not None and is_lazy(p) for p in module._parameters.values()) else None


def script_refusal(module: nn.Module) -> str | None:
    """Why nothing can be done to a module that was scripted or traced; else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a ScriptModule, whose forward cannot be changed. Adapt it before scripting."
    return None


def general_refusal(module: nn.Module, new_names: Iterable[str], way: Way) -> str | None:
    """Why a module of any kind cannot be adapted by a class swap, with the remedy; else None."""
    if scripted := script_refusal(module):
        return scripted
    if has_accelerate_hook(module) and any(p.is_meta for p in module.parameters(recurse=False)):
        return "accelerate has offloaded its weights. Remove the hooks, inject, and add them again."
    if way == "branch" and "forward" in module.__dict__:
        return (
            "a forward was set on this very instance (accelerate's hooks and transformers' tp_plan "
            "do that), and it would bypass the adapter. Remove it, inject, and set it again; for "
            "tensor parallelism use parallelize_module."
        )
    taken = [name for name in new_names if _has(module, name)]
    if taken:
        return f"it has an attribute {taken[0]} of its own. Give the adapter another name."
    return None


def _has(module: nn.Module, name: str) -> bool:
    """``hasattr``, without the cost of the exception where nn.Module looks for it."""
    if type(module).__getattr__ is not nn.Module.__getattr__:
        return hasattr(module, name)
    return (
        name in module.__dict__
        or name in module._parameters
        or name in module._buffers
        or name in module._modules
        or hasattr(type(module), name)
    )


def weight_refusal(module: nn.Module, weight: Tensor, spec: Spec, way: Way) -> str | None:
    """Why an adapter cannot follow this weight of the module, with the remedy; else None."""
    if min(*spec.A_shape, *spec.B_shape) < 1:
        return f"it has the size {spec.n_in} x {spec.n_out}, so there is nothing to adapt."
    if weight.is_complex():
        return f"its weight is complex ({weight.dtype}), which is not supported. Exclude it."
    if is_fully_sharded(module):
        return "FSDP has sharded its weight already. Inject before fully_shard or FSDP(model)."
    if is_distributed(weight) and not _can_follow(weight, spec, way):
        return (
            f"its {spec.weight} is already sharded (DTensor), where only the branch of a matrix "
            "can follow. Exclude it."
        )
    if way == "weight" and is_placeholder(weight):
        return (
            "its weight is partitioned by ZeRO-3, and read where no adapter can be added. Inject "
            "before deepspeed.zero.Init takes it, or exclude it."
        )
    if way == "weight" and not (spec.weight in module._parameters and is_plain(weight)):
        return (
            f"its {spec.weight} is quantized or not a parameter of its own, so that nothing can be "
            'added to it. Exclude it, or leave out how="weight", or the variant that acts there.'
        )
    return None


def _can_follow(weight: Tensor, spec: Spec, way: Way) -> bool:
    """Whether A and B can be placed as a DTensor is: a matrix beside which a branch is added."""
    matrix = tuple(weight.shape) in ((spec.n_out, spec.n_in), (spec.n_in, spec.n_out))
    fused = bool(spec.part) and weight.shape[0] >= spec.n_out and weight.dim() == 2
    return (
        way == "branch"
        and (matrix or fused)
        and weight.is_floating_point()
        and has_known_placements(weight)
    )
