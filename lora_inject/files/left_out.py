"""What a file of an adapter does not hold and its user needs: said when it is saved or loaded.

That is what trains in the model and is no adapter's, and other adapters below this one.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from lora_inject.core.drift import drift
from lora_inject.core.look import Look
from lora_inject.core.state import owned
from lora_inject.errors import LoRAInjectError, warn
from lora_inject.files.formats.data import AdapterData
from lora_inject.printing import plural
from lora_inject.settings import BASE


def require_nothing_left_out(look: Look, what: str) -> None:
    """Refuse to leave out what was thawed or put into the model since; warn of what was beside it.

    What was injected is known to hold all that trains, so that something trained would be lost in
    silence. Of what stands beside nobody has said that it is to be saved.

    Args:
        look: the model that is saved.
        what: what they are not in, for the message.

    Raises:
        LoRAInjectError: parameters train that were frozen or not there after ``inject``.
    """
    since = [each.path for each in drift(look, "came", "thawed") if each.trains]
    lost, beside = [list[tuple[nn.Module, list[str]]]() for _ in range(2)]
    for module, names in _left_out(look):
        path = look.index.path(module)
        known = any(_is_in(f"{path}.{name}".lstrip("."), top) for name in names for top in since)
        (lost if known else beside).append((module, names))
    if lost:
        text, remedy = _said(look, lost, what)
        raise LoRAInjectError(
            f"{text}, though inject had frozen them or they came since.",
            remedy=remedy or "Where you save them yourself, freeze(model) before this.",
        )
    if beside:
        text, remedy = _said(look, beside, what)
        warn(
            f"{text}. {remedy} torch.save of their own state dicts keeps them beside it, and what "
            "is not to train is to be frozen."
        )


def _left_out(look: Look) -> Iterator[tuple[nn.Module, list[str]]]:
    """Modules with the names of their parameters that train and that no adapter owns."""
    for module in look.index.modules:
        own = module._parameters
        if len(own) and any(p is not None and p.requires_grad for p in own.values()):
            state = look.states.get(module)
            ours = {name for name, owner, _ in owned(state) if owner != BASE}
            trains = [n for n, p in own.items() if p is not None and p.requires_grad]
            if left := [name for name in trains if name not in ours]:
                yield module, left


def _is_in(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")


def _said(look: Look, left: Sequence[tuple[nn.Module, list[str]]], what: str) -> tuple[str, str]:
    """What is left out, in words, and the remedy; "" where an adapter cannot have it."""
    paths = [look.index.path(module) for module, _ in left]
    number = sum(len(names) for _, names in left)
    shown = ", ".join(path or "the model itself" for path in paths[:3])
    text = (
        f"{plural(number, 'parameter')} that train and are no adapter's are not in {what}: "
        f"those of {shown}{', ...' if paths[3:] else ''}"
    )
    in_full = [path for (module, _), path in zip(left, paths, strict=True) if path]
    in_full = [path for path in in_full if not _holds_adapters(look, look.index.by_path[path])]
    remedy = f"freeze(model, train_also={in_full[:3]}) before saving makes them the adapter's."
    return text, remedy if in_full else ""


def _holds_adapters(look: Look, module: nn.Module) -> bool:
    inside = (look.adapted.get(m) for m in look.index.below(module))
    return any(state is not None and state.adapters for state in inside)


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
