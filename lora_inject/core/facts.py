"""What a model is now: its modules, its adapters and what is known of them, found in one walk."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from os import PathLike

import torch
from torch import Tensor, nn

from lora_inject.compat.marks import peft_modules
from lora_inject.core.adapter import Adapter
from lora_inject.core.index import Index
from lora_inject.core.state import State
from lora_inject.core.state_parts import Injection, Trained
from lora_inject.core.tensor_marks import mark_of, places_of
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.own import STATE, Place, own_tensor
from lora_inject.settings import BASE, BiasMode
from lora_inject.sharding import is_partial

# A copy of such a module has no attributes but its own.
_FORGETFUL = (torch.jit.ScriptModule, torch.fx.GraphModule)


class Facts:
    """What a model is when it is looked at; each thing is worked out when somebody asks for it.

    A ``Look`` is this with refusals. It stands apart from them, since what runs in an adapted layer
    (``recomputing.py``) looks at models too, and the refusals know of layers.

    Attributes:
        model: the model.
        index: its modules with their paths.
    """

    def __init__(self, model: nn.Module, index: Index | None = None) -> None:
        if not isinstance(model, nn.Module):
            swapped = "The model comes first." if isinstance(model, str | PathLike) else ""
            raise ArgumentError(
                f"model must be an nn.Module, not a {type(model).__name__}.", remedy=swapped
            )
        self.model = model
        self.index = index or Index(model)

    @cached_property
    def states(self) -> dict[nn.Module, State]:
        """What is known of each module that a call has reached."""
        found = {m: m.__dict__[STATE] for m in self.index.modules if STATE in m.__dict__}
        for module, state in list(found.items()):
            for path, noted in state.reach.noted:  # of a module that forgets it when it is copied
                inside = self.index.by_path.get(self.index.path(module, path))
                if inside is not None:
                    found.setdefault(inside, noted)
        return found

    @cached_property
    def forgetful(self) -> dict[nn.Module, list[tuple[str, nn.Module]]]:
        """The modules that forget their states when they are copied, by what they are in.

        Each with its path from there: the nearest module around it that is none of them.
        """
        found: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
        if any(issubclass(cls, _FORGETFUL) for cls in {type(m) for m in self.index.modules}):
            for path, module in self.index.by_path.items():
                above, around = path, module
                while above and isinstance(around, _FORGETFUL):
                    above = above.rpartition(".")[0]
                    around = self.index.by_path[above]
                if around is not module and not isinstance(around, _FORGETFUL):
                    inside = path.removeprefix(above).lstrip(".")
                    found.setdefault(around, []).append((inside, module))
        return found

    @cached_property
    def adapted(self) -> dict[nn.Module, State]:
        """Of these the modules on which an adapter has A and B, or that it trains in place."""
        return {m: state for m, state in self.states.items() if state.adapters or state.trained}

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """The adapted layers by path, awake or not."""
        return {self.index.path(m): m for m, state in self.states.items() if state.adapters}

    @cached_property
    def known(self) -> dict[str, BiasMode]:
        """The adapters whose calls reached the model, with their bias modes."""
        return {injection.adapter: injection.bias for injection in self.injections}

    @cached_property
    def used(self) -> dict[str, float]:
        """The adapters in use, with their weights; parts of the model may differ."""
        uses = {id(state.use): state.use for state in self.adapted.values()}
        return {name: weight for use in uses.values() for name, weight in use.weights.items()}

    @cached_property
    def adapters(self) -> list[tuple[nn.Module, Adapter]]:
        """Every adapter on every layer."""
        return [(m, adapter) for m, state in self.adapted.items() for adapter in state.adapters]

    @property
    def leaders_first(self) -> list[tuple[nn.Module, Adapter]]:
        """The same, with those that share the A and B of a tied layer after the others."""
        return sorted(self.adapters, key=lambda pair: bool(pair[1].follows))

    def leader(self, layer: nn.Module, adapter: Adapter) -> tuple[nn.Module, Adapter]:
        """The adapter of the tied layer whose A and B this one shares.

        Raises:
            LoRAInjectError: it is not here.
        """
        found = self._leaders.get((adapter.follows, adapter.name, adapter.seed))
        if found is None:
            raise LoRAInjectError(
                f"its adapter {adapter.name!r} shares its A and B with {adapter.follows}, which "
                "is not here or has been stripped.",
                path=self.index.path(layer),
                remedy="Call this on the whole model, or remove the adapter.",
            )
        return found

    @cached_property
    def _leaders(self) -> dict[tuple[str, str, int], tuple[nn.Module, Adapter]]:
        return {(a.path, a.name, a.seed): (m, a) for m, a in self.adapters if not a.follows}

    def target_path(self, layer: nn.Module, adapter: Adapter) -> str:
        """The path of what an adapter was put on: of a layer, or of a parameter of it."""
        of_parameter = adapter.kind.name == "parameter"
        return self.index.path(layer, adapter.specs[0].weight if of_parameter else "")

    @cached_property
    def injections(self) -> tuple[Injection, ...]:
        """The calls that put the adapters there, each once."""
        reaches = {id(state.reach): state.reach for state in self.states.values()}
        found = {i.id: i for reach in reaches.values() for i in reach.injections}
        return tuple(found.values())

    def said(self, adapter: str) -> str:
        """What the file of an adapter said besides, as JSON; "" where there was nothing."""
        return next((i.said for i in self.injections if i.adapter == adapter and i.said), "")

    @property
    def calls(self) -> Iterator[tuple[nn.Module, list[Injection]]]:
        """What ``inject`` was called on, with its calls on that."""
        for module, state in self.states.items():
            if state.reach.roots:
                yield module, [i for i in state.reach.injections if i.id in state.reach.roots]

    @cached_property
    def roots(self) -> frozenset[int]:
        """The ids of the injections that were called on the model or inside of it."""
        return frozenset().union(*(state.reach.roots for state in self.states.values()))

    @cached_property
    def trained(self) -> list[tuple[nn.Module, Trained]]:
        """Every place of the model of which something trains in place."""
        return [(m, trained) for m, state in self.adapted.items() for trained in state.trained]

    def tensor(self, module: nn.Module, trained: Trained, owner: str) -> Tensor | None:
        """An owner's tensor for such a place, wherever it is."""
        home = self.states[module].homes(trained).get(owner)
        return None if home is None else own_tensor(module, home)

    def waiting(self) -> Iterator[tuple[nn.Module, Trained, str]]:
        """Every tensor that waits: the module, the place that it is for, its name."""
        for module, trained in self.trained:
            for name in self.states[module].homes(trained).values():
                if name != trained.name and own_tensor(module, name) is not None:
                    yield module, trained, name

    @property
    def parameters(self) -> dict[nn.Parameter, None]:
        """Every parameter that is registered now, each once, in registration order."""
        return {
            parameter: None
            for module in self.index.modules
            for parameter in module._parameters.values()
            if parameter is not None
        }

    @cached_property
    def tensor_places(self) -> dict[int, list[Place]]:
        """Every place where a parameter or buffer is registered, by the id of the tensor."""
        places: dict[int, list[Place]] = {}
        for module in self.index.modules:
            for tensors in (module._parameters, module._buffers):
                if len(tensors):
                    for name, tensor in tensors.items():
                        if tensor is not None:
                            places.setdefault(id(tensor), []).append((module, name))
        return places

    @cached_property
    def tied(self) -> set[int]:
        """The ids of the parameters and buffers that are registered in several places."""
        return {key for key, places in self.tensor_places.items() if len(places) > 1}

    def everywhere(self, tensor: Tensor) -> list[Place]:
        """The places of a tensor in this model, and in other parts that calls have seen."""
        here = self.tensor_places.get(id(tensor), [])
        others = [p for p in places_of(mark_of(tensor)) if own_tensor(*p) is tensor]
        return list(dict.fromkeys([*here, *others]))

    def former_flag(self, tensor: Tensor) -> bool:
        """``requires_grad`` of a tensor from before any call.

        What its mark says; else what the state of a place of it remembers; else what it is.
        """
        mark = mark_of(tensor)
        if mark is not None and mark.flag is not None:
            return mark.flag
        if self.states:
            for module, name in self.tensor_places.get(id(tensor), ()):
                state = self.states.get(module)
                flag = None if state is None else state.before.flag(name)
                if flag is not None:
                    return flag
        return tensor.requires_grad

    def loaded_formers(self, places: Iterable[tuple[nn.Module, Trained]]) -> dict[int, Tensor]:
        """Values that something has written where the former ones are shown, as a base is loaded.

        Returns:
            The values that are the former ones from now on, in CPU memory, by the id of the old.
        """
        found: dict[int, Tensor] = {}
        for module, trained in places:
            tensor, former = own_tensor(module, trained.name), trained.former
            if tensor is None or former is None or tensor.is_meta or former.is_meta:
                continue
            if self.states[module].holder(trained) == BASE and not is_partial(tensor):
                value = tensor.detach()
                if value.shape != former.shape or id(former) in found:
                    continue
                if not torch.equal(value, former.to(value.device, value.dtype)):
                    found[id(former)] = value.to("cpu", copy=True)
        return found

    @cached_property
    def in_full(self) -> dict[nn.Module, str]:
        """The modules that train in full, with the name of an adapter that does it."""
        return {m: name for m, state in self.states.items() for name in state.reach.in_full}

    @cached_property
    def of_peft(self) -> dict[nn.Module, nn.Module]:
        """The modules that adapters of PEFT are made of, each with the layer that carries it."""
        return {
            module: layer
            for layer in self.index.modules
            for own in peft_modules(layer)
            for module in self.index.below(own)
        }

    @cached_property
    def tied_formers(self) -> dict[int, int]:
        """How many places of the model each former value is for."""
        found: dict[int, int] = {}
        for _, trained in self.trained:
            found[id(trained.former)] = found.get(id(trained.former), 0) + 1
        return found
