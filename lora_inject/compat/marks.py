"""What other libraries leave on modules and tensors, and how this library reads it.

None of these names is promised by anyone. Where one is gone, what is said here of a module is what
is said of one without the mark: nothing then works differently but with the library whose mark it
is, and the tests with that library say so.
"""

import json
from functools import partial
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

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

# Whose Linear classes compute W x + b, however their weight is stored or rounded on the way.
_LINEAR_LIBRARIES = (
    "bitsandbytes.", "torchao.float8.", "torchao.quantization.", "torchao.prototype.quant",
    "torch.ao.", "optimum.quanto.", "transformers.integrations.", "diffusers.quantizers.",
)  # fmt: skip

_CHECKPOINTING = "gradient_checkpointing"
# A mapping on a module, of which transformers saves none of the keys where it is tied to others.
TIED_KEYS = "_tied_weights_keys"
RESIZE = "resize_token_embeddings"  # of models of transformers


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run what a compiler or a tracer has made, which calls no hooks."""
    if isinstance(module, ScriptModule) or type(module).__name__ == "OptimizedModule":
        return True
    return module.__dict__.get("_compiled_call_impl") is not None  # of module.compile()


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate has hooked the module: it moves its tensors around a forward pass."""
    return "_hf_hook" in module.__dict__


def never_rescales(module: nn.Module) -> bool:
    """Whether a model of transformers has code that rescales weights, and does not use it: RWKV."""
    return getattr(getattr(module, "config", None), "rescale_every", None) == 0


def is_known_linear(cls: type[nn.Module]) -> bool:
    """Whether the forward of a Linear class is that of a library of quantized layers."""
    owner = next((base for base in cls.__mro__ if "forward" in vars(base)), cls)
    return owner.__module__.startswith(_LINEAR_LIBRARIES)


def kept_forwards(module: nn.Module) -> dict[str, MethodType]:
    """The forward methods of its class that accelerate's hooks keep on the module, by attribute."""
    kept = {name: module.__dict__.get(name) for name in ("_old_forward", "forward")}
    own = type(module).forward
    return {
        name: method
        for name, method in kept.items()
        if method is not None and getattr(method, "__func__", None) is own
    }


def forward_below(module: nn.Module) -> Any:
    """The function that a forward set on the instance leads to, through wrappers that say so.

    Not through what ``torch.compile`` made of one, which may hold the code of then.
    """
    found = module.__dict__.get("forward")
    while not hasattr(found, "_torchdynamo_orig_callable"):
        inner = getattr(found, "__wrapped__", getattr(found, "func", None))
        if inner is None:
            break
        found = inner
    return getattr(found, "__func__", found)


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


def peft_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that hold the tensors of PEFT's adapters on a layer of PEFT; else none."""
    names = _attribute(module, "adapter_layer_names")
    own = [module._modules.get(name) for name in names] if isinstance(names, tuple) else []
    return [child for child in own if child is not None]


def came_from_checkpoint(parameter: nn.Parameter) -> bool:
    """Whether transformers has loaded a parameter, and not made it anew; no of one of another's."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def rows_of_checkpoint(module: nn.Module) -> int | None:
    """How many tokens the checkpoint has that a model of transformers was loaded from.

    None where that is not on this machine as a directory, or does not say.
    """
    config = getattr(module, "config", None)
    folder = getattr(config, "_name_or_path", None)
    try:
        known = json.loads((Path(folder) / "config.json").read_text("utf-8")) if folder else {}
        rows = known.get("vocab_size", known.get("text_config", {}).get("vocab_size"))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return rows if isinstance(rows, int) else None


def sizes_of(module: nn.Module) -> dict[str, int]:
    """How many layers, heads and heads of keys a language model of transformers has.

    And whether its head is tied to its embeddings; nothing of a model that does not say it.
    """
    config = getattr(module, "config", None)
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads",
             "key_heads": "num_key_value_heads", "tied": "tie_word_embeddings"}  # fmt: skip
    said = {own: getattr(config, name, None) for own, name in names.items()}
    return {own: int(value) for own, value in said.items() if isinstance(value, int)}


def can_resize(module: nn.Module) -> bool:
    """Whether a module's class can resize its vocabulary."""
    return hasattr(type(module), RESIZE)


def resizable_embeddings(model: nn.Module) -> dict[nn.Module, Tensor]:
    """The modules with a row for each token, and their weights, of a model that can resize them."""
    if not callable(getattr(model, "resize_token_embeddings", None)):
        return {}
    found = {}
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, ask)()
        except (NotImplementedError, AttributeError, TypeError):  # models without tokens
            continue
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Module) and isinstance(weight, Tensor) and weight.dim():
            found[module] = weight
    return found


def reads_token_ids(module: nn.Module) -> bool | None:
    """Whether a model of transformers reads token ids, by itself or among others; None of another.

    A model with a decoder for them has another name for its ids, and its batch is that of what the
    encoder reads.
    """
    main = _attribute(module, "main_input_name")
    if not isinstance(main, str):
        return None
    kinds = _attribute(module, "input_modalities")
    if kinds is None:
        return main == "input_ids"
    text = "text" in ([kinds] if isinstance(kinds, str) else kinds)
    return text and (
        main == "input_ids" or "input_ids" in signature(type(module).forward).parameters
    )


def experts_function(module: nn.Module) -> str | None:
    """What transformers' fused experts run instead of their own forward; None where they run it."""
    if not isinstance(_attribute(module, "is_transposed"), bool):
        return None
    name = getattr(_attribute(module, "config"), "_experts_implementation", None)
    return None if name in (None, "eager") else str(name)


def compiles_to_own_operator(dtype: torch.dtype) -> bool:
    """Whether transformers, compiled, makes products by groups by the operator of its own."""
    known = hasattr(torch.ops.transformers, "grouped_mm_fallback")
    return known and dtype != torch.bfloat16


def is_fallback_of_grouped_product(function: Any) -> bool:
    """Whether it is the operator that transformers uses where torch has no grouped product."""
    return str(function).startswith("transformers.grouped_mm_fallback")


def _attribute(module: nn.Module, name: str) -> Any:
    """``getattr``, which is slow for what a module has not; of a model every module is asked."""
    own = module.__dict__
    return own[name] if name in own else getattr(type(module), name, None)


def config_of_peft(value: Any) -> dict[str, Any] | None:
    """What a LoraConfig of PEFT says, in our words; None of anything else."""
    if not (hasattr(value, "target_modules") and hasattr(value, "lora_alpha")):
        return None
    targets = value.target_modules
    if isinstance(targets, str):
        targets = targets if targets == "all-linear" else f"re:{targets}"
    said = {
        "targets": sorted(targets) if isinstance(targets, set) else targets,
        "r": value.r,
        "alpha": value.lora_alpha,
        "dropout": getattr(value, "lora_dropout", 0.0) or None,
        "train_also": getattr(value, "modules_to_save", None),
    }
    return {name: part for name, part in said.items() if part is not None}
