"""What a trainer's checkpoint has to hold of an adapted model: what it trains, and nothing else."""

from torch import Tensor, nn

from lora_inject.adapter import adapters_of
from lora_inject.errors import LoRAInjectError
from lora_inject.in_place import own_tensor, waiting_name
from lora_inject.record import records_in, require_awake, require_own_record
from lora_inject.settings import BASE


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Of ``model.state_dict()`` what belongs to its adapters, every one of them, in use or not.

    That is every A and B, and the biases, ``train_also`` modules and statistics that are trained in
    place; a tensor that is registered in several places comes once.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2, bias="lora_only")
        >>> list(trained_tensors(model))
        ['0.bias', '0.lora_A', '0.lora_B']

    Args:
        model: an adapted model, or a wrapper that holds it.

    Returns:
        The tensors by their keys in the state dict.

    Raises:
        LoRAInjectError: the model has no adapters, is merged or inside a block.
    """
    require_own_record(model)
    require_awake(model)
    records = [record for _, _, record in records_in(model)]
    if not records:
        raise LoRAInjectError("the model has no adapters.", remedy="Call inject first.")
    owned = {m: {name for a in adapters_of(m) for name in a.parameters} for m in model.modules()}
    for slot in (slot for record in records for slot in record.all_slots()):
        former = {(module, waiting_name(name, BASE)) for module, name in slot.places}
        for module, name in {*slot.places, *slot.waiting} - former:
            owned[module].add(name)
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name in (*module._parameters, *module._buffers):
            tensor = own_tensor(module, name)
            saved = name in owned[module] and name not in module._non_persistent_buffers_set
            if saved and tensor is not None:
                found.setdefault(id(tensor), (f"{path}.{name}".lstrip("."), tensor.detach()))
    return dict(found.values())
