"""The base model for a while: adapters asleep, and former values in place of those that trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_inject.errors import LoRAInjectError
from lora_inject.layer import is_asleep, merged_weights, put_to_sleep
from lora_inject.record import (
    adapted_layers,
    exchange,
    own_tensor,
    records_in,
    require_kept,
    require_own_record,
)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without its adapters, as before ``inject``, and then with them again.

    Layers have their own classes meanwhile, so the base costs what it cost before; biases and
    ``train_also`` modules that were trained show their former values. For the reference model of
    DPO or a KL term. Blocks may be nested, and an exception inside changes nothing.

    Example:
        >>> with disabled(model), torch.no_grad():  # doctest: +SKIP
        ...     reference = model(**batch).logits

    Args:
        model: an adapted model, merged or not.

    Yields:
        The same model.

    Raises:
        LoRAInjectError: the model has no adapters, or their weights were not kept when merging.
    """
    require_own_record(model)
    layers = adapted_layers(model)
    if not layers:
        raise LoRAInjectError("the model has no adapters.", remedy="Call inject first.")
    for path, layer in layers.items():
        require_kept(path, layer)
    awake = [layer for layer in layers.values() if not is_asleep(layer)]
    folded = [
        (weight, former, weight.detach())
        for layer in layers.values()
        for name, former in merged_weights(layer).items()
        if former is not None and (weight := own_tensor(layer, name)) is not None
    ]
    slots = _trained_slots(model)
    try:
        for layer in awake:
            put_to_sleep(layer, True)
        for weight, unmerged, _ in folded:
            exchange(weight, unmerged)
        for owned, name, _, former in slots:
            owned[name] = former
        yield model
    finally:
        for owned, name, trained, _ in slots:
            owned[name] = trained
        for weight, _, now in folded:
            exchange(weight, now)
        for layer in awake:
            put_to_sleep(layer, False)


def _trained_slots(
    model: nn.Module,
) -> list[tuple[Any, str, Tensor, Tensor | None]]:
    """(dict, name, trained tensor, former one) of everything that trains in place.

    Tensors are exchanged as objects, not by value, so that a graph that was made with the trained
    ones stays valid. A tied one is exchanged under all of its names.
    """
    former: dict[int, Tensor | None] = {}
    for _, _, record in records_in(model):
        for module, kept in record.before.values.items():
            for name, value in kept.items():
                tensor = own_tensor(module, name)
                if tensor is None or value is None:
                    continue
                stand_in = value.to(tensor.device, tensor.dtype, copy=True)
                is_parameter = isinstance(tensor, nn.Parameter)
                former[id(tensor)] = (
                    nn.Parameter(stand_in, requires_grad=False) if is_parameter else stand_in
                )
    return [
        (owned, name, tensor, former[id(tensor)])
        for module in model.modules()
        for owned in (module._parameters, module._buffers)
        for name, tensor in owned.items()
        if tensor is not None and id(tensor) in former
    ]
