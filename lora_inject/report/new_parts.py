"""Parts of a model that may be new, and that an injection leaves frozen: as random as they are.

Such as the classifier that transformers puts on a pretrained encoder. Where a model came from a
checkpoint transformers has marked what was in it; of others an output head may be new.
"""

from collections.abc import Iterable

from torch import nn

from lora_inject.compat.marks import came_from_checkpoint, resizable_embeddings
from lora_inject.core.choosing import Skip
from lora_inject.core.look import Look
from lora_inject.core.output_heads import BY_NAME, OF_LANGUAGE_MODELS
from lora_inject.core.state import owned
from lora_inject.printing import few


def new_and_frozen(look: Look) -> tuple[str, ...]:
    """What to say of frozen parts that were not in the checkpoint that a model came from."""
    if not _came_from_checkpoint(look):
        return ()
    loaded, new = _by_checkpoint(look)
    around = {above for path in loaded for above in _above(path)}
    tops = (next((a for a in _above(path) if a not in around), path) for path in new)
    why = "was not in the checkpoint that the model came from: it is new, and frozen"
    return _said(tops, why) if loaded else ()


def frozen_heads(look: Look, skipped: Iterable[Skip]) -> tuple[str, ...]:
    """What to say of output heads that were left alone, where nothing tells what is new."""
    if _came_from_checkpoint(look):
        return ()
    heads = (skip.path for skip in skipped if skip.reason == BY_NAME)
    paths = (path for path in heads if not OF_LANGUAGE_MODELS & {*path.split(".")})
    return _said(
        paths, "is taken for the output head and frozen; where it is new it would stay random"
    )


def _came_from_checkpoint(look: Look) -> bool:
    """Whether something of the model is known to come from one."""
    return any(map(came_from_checkpoint, look.parameters))


def _said(paths: Iterable[str], why: str) -> tuple[str, ...]:
    names = list(dict.fromkeys(paths))
    if not names:
        return ()
    also = f"train_also={names[:3]}"
    remedy = f"To train it: inject(..., {also}), or freeze(model, {also}) now."
    return (f"{few(names)} {why}. {remedy}",)


def _by_checkpoint(look: Look) -> tuple[list[str], list[str]]:
    """The paths of modules with parameters that were in a checkpoint, and of frozen ones without.

    Left out are quantized ones, whose tensors are others than those of the checkpoint, tables of
    tokens, which may have been resized, and adapters of PEFT.
    """
    loaded, new = list[str](), list[str]()
    others = look.of_peft.keys() | resizable_embeddings(look.model).keys()
    for module in look.index.modules if look.adapted else ():
        own = module._parameters
        if not len(own) or module in others:
            continue
        ours = {name for name, *_ in owned(look.states.get(module))}
        plain = [p for n, p in own.items() if type(p) is nn.Parameter and n not in ours]
        if any(map(came_from_checkpoint, plain)):
            loaded.append(look.index.path(module))
        elif any(p.is_floating_point() and not p.requires_grad for p in plain):
            new.append(look.index.path(module))
    return loaded, new


def _above(path: str) -> list[str]:
    """The paths of the modules around one, the largest first, and its own."""
    names = path.split(".")
    return [".".join(names[: i + 1]) for i in range(len(names))]
