"""What a file of an adapter does not hold and its user needs: said when it is saved or loaded.

That is what trains in the model and is no adapter's, and other adapters below this one.
"""

from lora_inject.core.look import Look
from lora_inject.core.state import owned
from lora_inject.errors import warn
from lora_inject.files.formats.data import AdapterData
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


def warn_of_unsaid_others(data: AdapterData, name: str, format: str) -> None:
    """Warn where a format does not say which adapters were in use while this one trained."""
    if data.beside and format not in ("peft", "diffusers"):
        warn(
            f"{name!r} was trained with {list(data.beside)} in use, and {format} has no word for "
            "that. Save those too, and use them together."
        )


def warn_of_left_parts(data: AdapterData) -> None:
    """Warn of what a file holds for other models of a pipeline."""
    if data.left:
        parts = " and ".join(f"{plural(n, 'layer')} of {name}" for name, n in data.left.items())
        warn(
            f"the file holds {parts} too, which are for other parts of a pipeline and are left: "
            "load each into its own model, or load_pipeline(pipe, path) does all at once."
        )


def warn_of_missing_others(data: AdapterData, look: Look, name: str) -> None:
    """Warn where adapters are not in the model that were in use while a loaded one trained."""
    if missing := [other for other in data.beside if other not in look.known]:
        together = ", ".join(map(repr, [*missing, name]))
        remedy = f"load them too, and say use(model, {together})."
        if name in missing:
            remedy = "load it under another name (adapter=), and them too, and use them together."
        warn(
            f"the adapter was trained with {missing} in use, and is right on top of them alone: "
            f"{remedy}"
        )
