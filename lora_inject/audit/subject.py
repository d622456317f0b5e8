"""What the checks look at: a model as it stands, an optimizer, and what one run of it showed."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.audit.observing import Seen
from lora_inject.core.adapter import Adapter, Pair
from lora_inject.core.look import Look
from lora_inject.core.state import owned
from lora_inject.sharding import is_distributed, is_placeholder


@dataclass(frozen=True)
class Ran:
    """What one forward and backward pass showed.

    Attributes:
        seen: what was seen of the modules.
        has_graph: whether the loss had one.
        is_finite: whether the loss was finite.
        reached: the nodes of the graph that it hung on.
        gradients: the largest magnitude of each gradient that came, by parameter; NaN or infinity
            where there is one in it.
        moved: the buffers that have changed.
        written: the parameters that have been written to.
    """

    seen: Seen
    has_graph: bool
    is_finite: bool
    reached: Set[Any]
    gradients: Mapping[nn.Parameter, float]
    moved: tuple[Tensor, ...]
    written: tuple[Tensor, ...]


class Subject:
    """What is audited.

    Args:
        look: the model.
        optimizer: what trains it, if that is known.
        ran: what a run showed, if there was one.
    """

    def __init__(self, look: Look, optimizer: Any = None, ran: Ran | None = None) -> None:
        self.look, self.optimizer, self._ran = look, optimizer, ran

    @property
    def ran(self) -> Ran:
        """What the run showed, for the checks that are made of one."""
        assert self._ran is not None
        return self._ran

    def path(self, module: nn.Module, name: str = "") -> str:
        """The path of a module, or of a tensor of it."""
        return f"{self.look.index.path(module)}.{name}".strip(".")

    @cached_property
    def pairs(self) -> list[tuple[nn.Module, Adapter, Pair]]:
        """Every pair that has tensors of its own."""
        return [
            (layer, adapter, pair)
            for layer, adapter in self.look.adapters
            if not adapter.follows
            for pair in adapter.pairs
            if all(name in layer._parameters for name in pair.names.values())
        ]

    @cached_property
    def readable(self) -> list[tuple[nn.Module, Adapter, Pair]]:
        """Those of them whose values are all here."""
        return [
            each for each in self.pairs if all(map(has_values, each[2].tensors(each[0]).values()))
        ]

    @cached_property
    def _zero(self) -> set[int]:
        """The ids of the tensors of adapters that are zero throughout."""
        own = [t for layer, _, pair in self.readable for t in pair.tensors(layer).values()]
        filled = [t for t in own if t.numel()]
        largest = numbers(t.detach().abs().max() for t in filled)
        return {id(t) for t, most in zip(filled, largest, strict=True) if most == 0}

    def factors(self, layer: nn.Module, pair: Pair) -> dict[str, nn.Parameter]:
        """The tensors of a pair that are multiplied with each other, by role."""
        own = pair.tensors(layer)
        return {role: t for role, t in own.items() if role not in _NO_FACTORS}

    def is_zero(self, tensor: Tensor) -> bool:
        """Whether a tensor of an adapter is zero throughout."""
        return id(tensor) in self._zero

    def adds(self, layer: nn.Module, pair: Pair) -> bool:
        """Whether a pair adds anything, as its values are."""
        if any(self.is_zero(t) for t in self.factors(layer, pair).values()):
            return False
        own = pair.tensors(layer)
        starts = [(own[role], own[f"{role}0"]) for role in ("A", "B") if f"{role}0" in own]
        return not starts or not all(torch.equal(now, start) for now, start in starts)

    @cached_property
    def trained(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """What trains of adapters: module, name, parameter."""
        found: dict[int, tuple[nn.Module, str, nn.Parameter]] = {}
        for module, state in self.look.adapted.items():
            for name, _, trains in owned(state):
                parameter = module._parameters.get(name)
                if trains and parameter is not None and parameter.requires_grad:
                    found.setdefault(id(parameter), (module, name, parameter))
        return [*found.values()]

    @cached_property
    def places(self) -> dict[int, str]:
        """The first path of every parameter, by its id."""
        found: dict[int, str] = {}
        for module in self.look.index.modules:
            for name, parameter in module._parameters.items() if len(module._parameters) else ():
                if parameter is not None:
                    found.setdefault(id(parameter), self.path(module, name))
        return found


# What has a value of its own beside the product: starts that are subtracted, lengths of rows.
_NO_FACTORS = ("A0", "B0", "magnitude")


def has_values(tensor: Tensor) -> bool:
    """Whether the values are all here."""
    return not (tensor.is_meta or is_distributed(tensor) or is_placeholder(tensor))


def numbers(scalars: Iterable[Tensor]) -> list[float]:
    """The values of scalars, with one wait for each device."""
    own = list(scalars)
    found = [0.0] * len(own)
    for device in dict.fromkeys(t.device for t in own):
        at = [i for i, t in enumerate(own) if t.device == device]
        values = torch.stack([own[i].detach().float().reshape(()) for i in at]).tolist()
        for i, value in zip(at, values, strict=True):
            found[i] = value
    return found
