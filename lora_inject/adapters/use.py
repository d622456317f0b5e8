"""Several adapters in one model: which of them are in use, and taking one out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.changes.edits import surely
from lora_inject.core.arranging import Flags
from lora_inject.core.commit import commit
from lora_inject.core.company import use_of
from lora_inject.core.drift import warn_of_drift
from lora_inject.core.look import Look
from lora_inject.core.removal import remove_adapters
from lora_inject.core.state import State
from lora_inject.core.state_parts import Trained, Use
from lora_inject.errors import ArgumentError
from lora_inject.own import Model
from lora_inject.settings import check_names, check_weights


def use(model: Model, *adapters: Any, train: Any = None) -> Model:
    """Choose the adapters that run: one, several that add up, weighted ones, or none.

    Biases and ``train_also`` modules that an adapter trained are swapped in with it. Layers on
    which none of the chosen adapters stands have their own classes and cost what they cost before.
    Gradients stay where ``train`` is left out, so that adapters can be trained in turns; what an
    explicit ``train`` freezes loses them.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2, adapter="fr")
        >>> _ = inject(model, nn.Linear, r=4, adapter="de")
        >>> _ = use(model, "fr")  # only this one
        >>> _ = use(model, "fr", "de")  # the sum
        >>> _ = use(model, {"fr": 0.7, "de": 0.3})  # a weighted sum, computed at run time
        >>> _ = use(model)  # none: the base model

    Args:
        model: an adapted model, or a part of one.
        adapters: names, or one mapping of names to finite weights.
        train: the names of those that train, in use or not; None for those in use. All other
            adapters are frozen.

    Returns:
        The same object.

    Raises:
        ArgumentError: an adapter is not known, or two own the same bias or ``train_also`` module,
            which cannot be added up, or one that owns some has a weight other than 1.
        LoRAInjectError: the model has no adapters, they are merged, or it is inside a block that
            decides what runs. Nothing has changed then.
    """
    one_mapping = len(adapters) == 1 and isinstance(adapters[0], Mapping)
    given = adapters[0] if one_mapping else dict.fromkeys(check_names(adapters, "adapters"), 1.0)
    weights = check_weights(given)
    look = Look(model)
    look.require_adapters()
    trains = frozenset(weights if train is None else check_names(train, "train"))
    look.require_known(weights, "adapters")
    look.require_known(trains, "train")
    look.require_awake()
    look.require_switchable()
    warn_of_drift(look, "gone")
    chosen = use_of(look, weights, trains)
    flags: Flags = "switched" if train is None else "owned"
    _switch(look, dict.fromkeys(look.adapted, chosen), flags)
    return model


@contextmanager
def in_use(look: Look, weights: Mapping[str, float]) -> Iterator[None]:
    """Run other adapters for the length of a block; what trains goes on to, and none of them does.

    Args:
        look: the model, not merged and in no block.
        weights: the adapters, with the weights that they count with; none is the base model.
    """
    former = {module: state.use for module, state in look.adapted.items()}
    others = {id(use): use._replace(weights=weights) for use in former.values()}
    try:
        _switch(look, {module: others[id(use)] for module, use in former.items()}, "changed")
        yield
    finally:
        surely(lambda: _switch(look.again(), former, "changed"))


def _switch(look: Look, uses: Mapping[nn.Module, Use], flags: Flags) -> None:
    """Let other adapters run on these modules.

    Raises:
        ArgumentError: two own what trains in place, or one that does has a weight other than 1.
        LoRAInjectError: a former value cannot be shown.
    """
    states = {
        module: State(old.before, old.reach, use, old.adapters, old.trained)
        for module, use in uses.items()
        for old in [look.adapted[module]]
    }
    moving = []
    for module, trained in look.trained:
        _require_one_owner(module, trained, uses[module].weights)
        if states[module].holder(trained) != look.states[module].holder(trained):
            moving.append((module, trained))
    look.require_restorable(moving)
    formers = look.loaded_formers(moving)
    for module, _ in moving if formers else ():
        states[module] = states[module].with_formers(formers)
    commit(look, states, flags=flags)


def remove(model: Model, adapters: Any) -> Model:
    """Take adapters out, exactly: what is left is as if they had never been there.

    The base's own tensors get back the values from before, for biases and modules that only these
    adapters trained. With the last adapter everything comes back that ``strip`` brings back.

    Example:
        >>> remove(model, "fr")  # doctest: +SKIP

    Args:
        model: an adapted model, or a part of one.
        adapters: a name or several.

    Returns:
        The same object.

    Raises:
        ArgumentError: an adapter is not known.
        LoRAInjectError: they are merged, the model is inside a block that decides what runs, or a
            former value cannot be put back. Nothing has changed then.
    """
    names = check_names(adapters, "adapters")
    look = Look(model)
    look.require_known(names, "adapters")
    look.require_intact()
    look.require_awake()
    remove_adapters(look, names)
    return model


def _require_one_owner(module: nn.Module, trained: Trained, weights: Mapping[str, float]) -> None:
    """Refuse what cannot stand in a place: two adapters' tensors, or one with a weight.

    Raises:
        ArgumentError: it cannot.
    """
    owners = [name for name in weights if name in trained.owners]
    if len(owners) > 1:
        raise ArgumentError(
            f"{owners[0]!r} and {owners[1]!r} both trained {trained.text(module)}, which cannot be "
            "added up.",
            remedy="Use one of them at a time.",
        )
    if owners and weights[owners[0]] != 1.0:
        raise ArgumentError(
            f"{owners[0]!r} trained {trained.text(module)}, which cannot count with a weight.",
            remedy="Use it with a weight of 1.",
        )
