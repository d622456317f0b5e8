"""Which adapters were in use while another one trained: what it learned holds on top of them only.

Nobody sees a step of an optimizer; but torch counts the writes to every tensor, and what trains has
been written to more often at the end of a use of several adapters than when it began.
"""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from lora_inject.core.look import Look
from lora_inject.core.state_parts import Use


def company(look: Look) -> dict[str, frozenset[str]]:
    """By adapter, the others that were in use while it trained; those without any are left out."""
    uses = {id(state.use): state.use for state in look.adapted.values()}.values()
    found: dict[str, frozenset[str]] = {}
    for name, now in _writes(look, _together(look)).items():
        if all(use.writes.get(name) != now for use in uses):
            found[name] = frozenset(look.used) - {name}
    for use in uses:
        for name, others in use.beside.items():
            found[name] = found.get(name, frozenset()) | others
    return found


def use_of(look: Look, weights: Mapping[str, float], trains: frozenset[str]) -> Use:
    """The use of these adapters of a model from now on, which remembers those before."""
    together = trains & weights.keys() if len(weights) > 1 else frozenset[str]()
    return Use(weights, trains, company(look), _writes(look, together))


def joined(look: Look, use: Use, name: str, writes: int) -> Use:
    """A use that a new adapter joins and trains in.

    Args:
        look: the model, without it.
        use: the use.
        name: the new adapter.
        writes: how often its tensors have been written to.
    """
    before = _writes(look, look.used.keys() & _trains(look))
    return use._replace(
        weights={name: 1.0, **use.weights}, trains=use.trains | {name},
        writes={**before, name: writes},
    )  # fmt: skip


def _together(look: Look) -> set[str]:
    """The adapters that train while others are in use too; parts of the model may differ."""
    return look.used.keys() & _trains(look) if len(look.used) > 1 else set()


def _trains(look: Look) -> frozenset[str]:
    return frozenset().union(*(state.use.trains for state in look.adapted.values()))


def writes_to(tensors: Iterable[Tensor]) -> int:
    """How often tensors have been written to; those of inference mode do not count."""
    return sum(tensor._version for tensor in tensors if not tensor.is_inference())


def _writes(look: Look, names: Collection[str]) -> dict[str, int]:
    found = dict.fromkeys(names, 0)
    for layer, adapter in look.adapters if names else ():
        if adapter.name in found:
            own = (layer._parameters.get(name) for name in adapter.parameters)
            found[adapter.name] += writes_to(tensor for tensor in own if tensor is not None)
    return found
