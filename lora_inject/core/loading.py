"""A base that is loaded under adapters: what comes under the base's own names is the base then.

A state dict without a tensor of an adapter is one of a base. Former values become what it has;
adapters keep what they have trained in place, and what they have not trained yet follows the base.
A merged weight is no base: a state dict says of which weights it is, and is refused elsewhere.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.changes.edits import Edit, attribute_edit, run, value_edit
from lora_inject.core.look import Look
from lora_inject.core.state_parts import Trained
from lora_inject.errors import FormatError
from lora_inject.own import STATE, own_tensor
from lora_inject.sharding import whole


class Loaded(NamedTuple):
    """A place that is about to be loaded.

    Attributes:
        module: the module.
        trained: the place.
        had: of the adapters whose tensors have been trained, the tensors by owner.
    """

    module: nn.Module
    trained: Trained
    had: dict[str, Tensor]


def merged_weights(look: Look, *, shown: bool = False) -> set[str]:
    """The weights that something is merged into, by their keys in the model's state dict.

    Args:
        look: the model.
        shown: only where the merged value stands in the place, as in no ``disabled`` block.
    """
    return {
        f"{path}.{name}".lstrip(".")
        for module, state in look.adapted.items()
        if state.merged and not (shown and state.blocks)
        for path in look.index.paths[module]
        for name in state.merged.former
    }


def require_as_merged(look: Look, keys: Collection[str], given: Collection[str]) -> None:
    """Refuse merged weights for a model where they are not merged, and the other way round.

    Args:
        look: the model.
        keys: of the state dict, below the model.
        given: those of them that are merged weights.

    Raises:
        FormatError: some are; the update would count twice, or be lost.
    """
    own = merged_weights(look)
    wrong = sorted({*given} & {*keys} - own), sorted(own & {*keys} - {*given})
    if wrong[0]:
        raise FormatError(
            f"{wrong[0][0]} has an adapter merged into it, which would count twice here.",
            remedy="Nothing was loaded. Take the state dict after unmerge, or strip this model.",
        )
    if wrong[1]:
        raise FormatError(
            f"an adapter is merged into {wrong[1][0]}, and would be lost with what is loaded.",
            remedy="Nothing was loaded. Call unmerge first and merge again then.",
        )


def before_loading(look: Look, keys: Collection[str]) -> list[Loaded]:
    """What a base will be loaded into of what adapters train in place."""
    return [
        Loaded(module, trained, dict(_trained_values(look, module, trained)))
        for module, trained in look.trained
        if any(f"{p}.{trained.name}".lstrip(".") in keys for p in look.index.paths[module])
    ]


def _trained_values(
    look: Look, module: nn.Module, trained: Trained
) -> Iterator[tuple[str, Tensor]]:
    for owner in trained.owners:
        tensor = look.tensor(module, trained, owner)
        if tensor is not None and not _is_like(tensor, trained.former):
            yield owner, tensor.detach().clone()


def _is_like(tensor: Tensor, former: Tensor | None) -> bool:
    """Whether a tensor has a former value still, or none, where that was not known yet."""
    if former is None or tensor.is_meta or former.is_meta:
        return former is not None
    value = whole(tensor.detach())
    return torch.equal(value, former.to(value.device, value.dtype))


def after_loading(look: Look, places: Collection[Loaded]) -> None:
    """Make what was loaded the former value, and give adapters back what they have trained."""
    formers: dict[int, Tensor] = {}
    values: dict[int, Edit] = {}  # by the tensor: tied ones are written once
    for module, trained, had in places:
        state, tensor = look.states[module], own_tensor(module, trained.name)
        now = state.find(trained.name)
        if tensor is None or tensor.is_meta or now is None or now.former is not trained.former:
            continue  # or an inner model has seen to it already
        former = formers.setdefault(id(now.former), whole(tensor.detach()).to("cpu", copy=True))
        for owner, home in state.homes(now).items():
            own = own_tensor(module, home)
            if own is not None and (home != now.name or owner in had):
                value = had[owner] if owner in had else former.clone()
                values[id(own)] = value_edit(own, value)
    states = {m: look.states[m] for m, trained in look.trained if id(trained.former) in formers}
    noted = [attribute_edit(m, STATE, s.with_formers(formers)) for m, s in states.items()]
    run([*values.values(), *noted])
