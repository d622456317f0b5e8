"""The weights that an adapter leaves alone: a sample of their values goes with it.

An adapter was trained over them too, such as a new head that stayed frozen and is in no file. Where
they are others now, the outputs are; but a part may be meant to differ, so that it is a warning.
"""

from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_inject.core.look import Look
from lora_inject.core.state import owned
from lora_inject.errors import warn
from lora_inject.files.fingerprint import differs, fingerprints, how_it_differs
from lora_inject.own import Place, own_tensor
from lora_inject.printing import few, plural

MOST = 256  # weights of which a sample is taken, evenly over the model
SAMPLES = 2  # values of each


def untouched(look: Look, paths: Mapping[nn.Module, str], held: Container[str]) -> dict[str, Any]:
    """The fingerprints of a sample of such weights, by their names in the bare model.

    The values of sharded ones are on several ranks, all of which must call this.

    Args:
        look: the model.
        paths: of its modules in the bare model.
        held: the names of what the adapter is on, or has a fingerprint of its own.
    """
    found = {key: weight for key, weight in _weights(look, paths) if key not in held}
    names = list(found)
    if len(names) > MOST:
        step = (len(names) - 1) / (MOST - 1)
        names = [names[round(i * step)] for i in range(MOST)]
    return fingerprints({name: found[name] for name in names}, SAMPLES)


def _weights(look: Look, paths: Mapping[nn.Module, str]) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are no adapter's, each once."""
    seen = set[int]()
    for module in look.index.modules:
        own = module._parameters
        if not len(own) or module not in paths:
            continue
        ours = {name for name, *_ in owned(look.states.get(module))}
        for name, weight in own.items():
            if weight is not None and name not in ours and id(weight) not in seen:
                seen.add(id(weight))
                yield f"{paths[module]}.{name}".lstrip("."), weight


def warn_of_other_weights(
    look: Look, places: Mapping[str, Place], saved: Mapping[str, Any]
) -> None:
    """Warn of weights that are not those of the sample; rounding alone is no difference.

    Args:
        look: the model.
        places: of the weights, by their names in the sample.
        saved: the sample.
    """
    others = []
    for key, (module, name) in places.items():
        weight, state = own_tensor(module, name), look.states.get(module)
        if weight is None or (state and state.find(name)):
            continue
        if differs(saved[key], weight) and how_it_differs(saved[key], weight) != "rounding":
            others.append(key)
    if others:
        warn(
            f"{plural(len(others), 'weight')} beside the adapter are not those that it was trained "
            f"over: {few(others)}. Outputs will be others than then. What was new "
            "and random in the base is in no file of an adapter: train it with one (train_also=), "
            "or save the base."
        )
