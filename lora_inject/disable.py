"""The base model for a while: nothing runs, and former values stand in for what was trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_inject.adapter import state_of
from lora_inject.errors import LoRAInjectError
from lora_inject.in_place import own_tensor, show
from lora_inject.layer import change
from lora_inject.record import adapted_layers, exchange, records_in, require_own_record
from lora_inject.refusals import require_kept


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
    states = {layer: state for layer in layers.values() if (state := state_of(layer)) is not None}
    running = [layer for layer, state in states.items() if not state.disabled]
    folded = [
        (weight, former, weight.detach())
        for layer, state in states.items()
        for name, former in state.former.items()
        if former is not None and (weight := own_tensor(layer, name)) is not None
    ]
    slots = {slot: slot.inside for _, _, r in records_in(model) for slot in r.all_slots()}
    try:
        for layer in running:
            change(layer, disabled=True)
        for weight, unmerged, _ in folded:
            exchange(weight, unmerged)
        show(model, dict.fromkeys(slots))
        yield model
    finally:
        show(model, slots)
        for weight, _, now in folded:
            exchange(weight, now)
        for layer in running:
            change(layer, disabled=False)
