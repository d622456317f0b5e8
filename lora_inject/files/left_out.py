"""What trains in a model and is in no file of an adapter: said when the adapter is saved."""

from lora_inject.core.look import Look
from lora_inject.core.state import owned
from lora_inject.errors import warn
from lora_inject.printing import plural
from lora_inject.settings import BASE


def warn_of_left_out(look: Look, what: str) -> None:
    """Warn of parameters that train and that no adapter owns.

    They stand beside what was injected, or were thawed or put into the model since.

    Args:
        look: the model that is saved.
        what: what they are not in, for the message.
    """
    paths, in_full, number = list[str](), list[str](), 0
    for module in look.index.modules:
        own = module._parameters
        if not len(own) or not any(p is not None and p.requires_grad for p in own.values()):
            continue
        state, path = look.states.get(module), look.index.path(module)
        ours = {name for name, owner, _ in owned(state) if owner != BASE}
        left = [n for n, p in own.items() if p is not None and p.requires_grad and n not in ours]
        number += len(left)
        if left:
            paths.append(path)
            below = (look.own.get(m) for m in look.index.below(module))
            if path and not any(inside and inside.adapters for inside in below):
                in_full.append(path)
    if number:
        shown = ", ".join(path or "the model itself" for path in paths[:3])
        remedy = f"freeze(model, train_also={in_full[:3]}) before saving makes them the adapter's, "
        warn(
            f"{plural(number, 'parameter')} that train and are no adapter's are not in {what}: "
            f"those of {shown}{', ...' if paths[3:] else ''}. {remedy if in_full else ''}"
            "torch.save of their own state dicts keeps them beside it, and what is not to train "
            "is to be frozen."
        )
