"""The base model for a while: nothing runs, and former values stand in for what was trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_inject.core.look import Look
from lora_inject.in_place import own_tensor, show
from lora_inject.layer import change
from lora_inject.record import exchange


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
    look = Look(model)
    look.require_own_record()
    look.require_layers()
    look.require_kept()
    running = [layer for layer, state in look.states.items() if not state.disabled]
    folded = [
        (weight, former, weight.detach())
        for layer, state in look.states.items()
        for name, former in state.former.items()
        if former is not None and (weight := own_tensor(layer, name)) is not None
    ]
    slots = {slot: slot.inside for slot in look.slots}
    try:
        for layer in running:
            change(layer, disabled=True)
        for weight, unmerged, _ in folded:
            exchange(weight, unmerged)
        show(look, dict.fromkeys(slots))
        yield model
    finally:
        show(Look(model), slots)
        for weight, _, now in folded:
            exchange(weight, now)
        for layer in running:
            change(layer, disabled=False)
