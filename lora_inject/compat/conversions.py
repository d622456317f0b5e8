"""How transformers' checkpoints name and divide the weights of its models, by its own mapping.

Since transformers 5 a model may hold as one tensor what its checkpoint has in many, experts above
all, and call modules otherwise. What reads checkpoints, and what transformers 4 and PEFT made of
its models, has the checkpoint's names. PEFT relies on the same functions. Of a model without such
a mapping, or where these functions are gone, the names are those of the checkpoint.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, which knows how its checkpoint has it."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


def is_converted(model: nn.Module) -> bool:
    """Whether anything of a model is called or divided otherwise in its checkpoint."""
    return bool(_to_checkpoint(model))


def in_checkpoint(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for weights of a model, by name, as its checkpoint has them.

    Args:
        model: the model, without wrappers.
        values: what stands for weights, in their dimensions.
    """
    conversions = _to_checkpoint(model)
    if not values or not conversions:
        return {**values}
    loading = import_module("transformers.core_model_loading")
    # Of the architecture, and not of the checkpoint alone that this model was loaded from.
    said = SimpleNamespace(_weight_conversions=conversions, config=model.config)
    found: dict[str, Tensor] = loading.revert_weight_conversion(said, {**values})
    return found


def names_in_checkpoint(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """What a checkpoint calls weights of a model; what it divides otherwise keeps its name."""
    try:
        back = [each.reverse_transform() for each in reversed(_to_checkpoint(model))]
    except (NotImplementedError, ValueError):  # a mapping of one direction
        back = []
    renamed = {}
    for name in names:
        own = name
        if not any(_divides(each) and each.rename_source_key(name)[1] for each in back):
            for each in back:
                own = own if _divides(each) else each.rename_source_key(own)[0]
        renamed[name] = own
    return renamed


def names_in_model(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Which weights of a model are made of those of a checkpoint, by the latter's names."""
    conversions = _conversions(model, add_legacy=True)
    if not conversions:
        return {name: name for name in names}
    rename = import_module("transformers.core_model_loading").rename_source_key
    plain = [each for each in conversions if not _divides(each)]
    others = [each for each in conversions if _divides(each)]
    return {name: rename(name, plain, others)[0] for name in names}


def _divides(conversion: Any) -> bool:
    """Whether it makes other tensors, and not other names alone."""
    return hasattr(conversion, "operations")


def _to_checkpoint(model: nn.Module) -> list[Any]:
    """What is taken back on the way to a checkpoint; whether that had a prefix is not known."""
    found = _conversions(model, add_legacy=False)
    return [each for each in found if type(each).__name__ != "PrefixChange"]


def _conversions(model: nn.Module, add_legacy: bool) -> list[Any]:
    """The conversions from a checkpoint to a model of transformers; none of another's."""
    if not is_of_transformers(model):
        return []
    try:
        mapping = import_module("transformers.conversion_mapping")
        found: list[Any] = mapping.get_model_conversion_mapping(model, add_legacy=add_legacy)
    except (ImportError, AttributeError, TypeError):  # before transformers 5, or after a change
        return []
    return found
