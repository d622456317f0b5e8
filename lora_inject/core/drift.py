"""What has been done to a model since: where it is not what its states say.

Layers are replaced, parameters thawed and modules added after ``inject``, by whoever owns the
model. A call that would lose something by that is refused; others say it, with the remedy.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from torch import nn

from lora_inject.core.layer import LoRALayer
from lora_inject.core.layer_checks import has_own_forward
from lora_inject.core.look import Look
from lora_inject.core.state import State, owned, state_of
from lora_inject.core.state_parts import Injection
from lora_inject.core.tensor_marks import mark_of
from lora_inject.errors import LoRAInjectError, warn
from lora_inject.printing import few
from lora_inject.settings import BASE

Kind = Literal["gone", "came", "thawed", "frozen", "class", "forward"]


class Drift(NamedTuple):
    """One place where a model is not what its states say.

    Attributes:
        kind: "gone", what an adapter had something on; "came", a module or parameter that no call
            knows of; "thawed" and "frozen", parameters that train or not, unlike what a call said;
            "class" and "forward", of an adapted layer, that are not its own any more.
        path: of the module or parameter; of what is gone, where it was.
        trains: of what came or was thawed, how many parameters train.
    """

    kind: Kind
    path: str
    trains: int = 0


# What is said of each kind, around the paths, and the remedy.
_SAYS: dict[Kind, tuple[str, str]] = {
    "gone": (
        "had something of an adapter and were replaced or taken out since",
        "Put them back or call inject on what took their place; where this is meant, freeze(model) "
        "takes the model as it is.",
    ),
    "came": (
        "came into the model since inject, and no adapter knows of them",
        "Call inject to adapt them, or freeze(model, train_also=...) to train and save them with "
        "an adapter.",
    ),
    "thawed": (
        "train, which inject had frozen: no file of an adapter holds them, and strip leaves them "
        "as they are",
        "freeze(model, train_also=...) makes them an adapter's, freeze(model) freezes them.",
    ),
    "frozen": (
        "were frozen since, though their adapter trains",
        "use(model, ...) with its name lets them train again, and train=() freezes it.",
    ),
    "class": (
        "have another class since, so that their adapters do not run",
        "Undo that, or do it before inject or after strip.",
    ),
    "forward": (
        "had a forward set on the instance since, which may pass the adapter by",
        "Take it off (del layer.forward).",
    ),
}


def drift(look: Look, *kinds: Kind) -> list[Drift]:
    """What has drifted in a model, of these kinds, by comparison with its states.

    What came in the place of what is gone is named once.
    """
    found = [each for kind in kinds for each in _FINDS[kind](look)]
    gone = {each.path for each in found if each.kind == "gone"}
    return [each for each in found if each.kind != "came" or each.path not in gone]


def sentences(found: Iterable[Drift]) -> list[str]:
    """What has drifted in words, one sentence for each kind, with the remedy."""
    paths: dict[Kind, list[str]] = {}
    for each in found:
        paths.setdefault(each.kind, []).append(each.path or "the model itself")
    return [_sentence(kind, own) for kind, own in paths.items()]


def _sentence(kind: Kind, paths: list[str]) -> str:
    what, remedy = _SAYS[kind]
    return f"{few(paths)} {what}. {remedy}"


def warn_of_drift(look: Look, *kinds: Kind) -> None:
    """Warn of what has drifted in a model."""
    for text in sentences(drift(look, *kinds)):
        warn(text)


def require_nothing_gone(look: Look, adapter: str) -> None:
    """Refuse to go on without a part of an adapter.

    Raises:
        LoRAInjectError: a layer that it stood on is not in the model any more.
    """
    gone = [Drift("gone", path) for path, name in _gone_of(look) if name == adapter]
    for text in sentences(gone):
        raise LoRAInjectError(text)


def _gone(look: Look) -> Iterator[Drift]:
    for path in dict.fromkeys(path for path, _ in _gone_of(look)):
        yield Drift("gone", path)


def _gone_of(look: Look) -> Iterator[tuple[str, str]]:
    """Path and adapter of what an adapter had something on, and what is not in the model now."""
    for root, calls in look.calls:
        top = look.index.path(root)
        layers, in_full = held_below(look, root)
        for call in calls:
            lost = [*(call.layers - layers.get(call.adapter, frozenset()))]
            lost += call.in_full - in_full.get(call.adapter, frozenset())
            paths = [f"{top}.{path}".strip(".") for path in sorted(lost)]
            yield from ((p, call.adapter) for p in paths if not _is_reached(look, p, call))


def _is_reached(look: Look, path: str, call: Injection) -> bool:
    """Whether the module is there still: then strip, on a part, has taken the adapter off."""
    module = look.index.by_path.get(path)
    state = None if module is None else look.states.get(module)
    return state is not None and (
        call in state.reach.injections and call.adapter not in [a.name for a in state.adapters]
    )


def held_below(look: Look, root: nn.Module) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """By adapter: the layers that it stands on, and the modules selected to train in full.

    The layers by the paths that they had when it was put there, so that those that were moved are
    among them; the modules by their paths below the root.
    """
    layers, in_full = dict[str, set[str]](), dict[str, set[str]]()
    inside = None if root is look.model else set(look.index.below(root))
    for module, adapter in look.adapters:
        if inside is None or module in inside:
            layers.setdefault(adapter.name, set()).add(adapter.path)
    top = look.index.path(root)
    for module, state in look.states.items():
        for name in state.reach.tops:
            if inside is None or module in inside:
                paths = look.index.paths[module]
                below = {p.removeprefix(top).lstrip(".") for p in paths}
                in_full.setdefault(name, set()).update(below)
    return layers, in_full


def _came(look: Look) -> Iterator[Drift]:
    """Modules with parameters of their own, and parameters of modules that are known."""
    for parent, name, child in look.index.children:
        # What torch's parametrizations make of a parameter stands in a module of that name.
        if child in look.states or parent not in look.states or name == "parametrizations":
            continue
        inside = look.index.below(child)
        own = [p for m in inside for p in m._parameters.values() if p is not None]
        is_wrapper = any(m in look.states for m in inside)
        if own and not is_wrapper and all(mark_of(p) is None for p in own):
            yield Drift("came", look.index.path(child), sum(p.requires_grad for p in own))
    for module, state in look.states.items():
        for name in _unknown(module, state) if len(module._parameters) else ():
            path = look.index.path(module, name)
            yield Drift("came", path, int(module.get_parameter(name).requires_grad))


def _unknown(module: nn.Module, state: State) -> list[str]:
    own, known = module._parameters, {name for name, _ in state.before.flags}
    if not all(name in own for name in known):
        return []  # pruning and norms have made other parameters of those
    known |= {name for name, *_ in owned(state)}
    return [n for n, p in own.items() if p is not None and n not in known and mark_of(p) is None]


def _thawed(look: Look) -> Iterator[Drift]:
    for module in look.states:
        for name, parameter in module._parameters.items() if len(module._parameters) else ():
            if parameter is not None and parameter.requires_grad:
                # Without a mark another call may have let it train: strip, of a shallow copy.
                places = look.everywhere(parameter) if mark_of(parameter) is not None else []
                if places and not any(_is_owned(*place) for place in places):
                    yield Drift("thawed", look.index.path(module, name), 1)


def _is_owned(module: nn.Module, name: str) -> bool:
    return any(n == name and owner != BASE for n, owner, _ in owned(state_of(module)))


def _frozen(look: Look) -> Iterator[Drift]:
    for module, state in look.adapted.items():
        for name, _, trains in owned(state):
            parameter = module._parameters.get(name)
            if trains and parameter is not None and not parameter.requires_grad:
                yield Drift("frozen", look.index.path(module, name))


def _class(look: Look) -> Iterator[Drift]:
    for path, layer in look.layers.items():
        if look.states[layer].running and not isinstance(layer, LoRALayer):
            yield Drift("class", path)


def _forward(look: Look) -> Iterator[Drift]:
    for path, layer in look.layers.items():
        if look.states[layer].running and has_own_forward(layer, look.states[layer]):
            yield Drift("forward", path)


_FINDS = {
    "gone": _gone, "came": _came, "thawed": _thawed, "frozen": _frozen, "class": _class,
    "forward": _forward,
}  # fmt: skip
