"""What a model is now: its modules, its adapters and what is known of them, found in one walk.

Every call looks once and passes the look down. A look changes nothing; after a change ``again``
looks at the same modules anew. What a call cannot do is said here, by path, before it does it.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from lora_inject.compat.marks import has_accelerate_hook, is_fully_sharded, kept_forwards
from lora_inject.core.adapter import Adapter
from lora_inject.core.class_swap import is_intact
from lora_inject.core.index import Index
from lora_inject.core.layer import LoRALayer
from lora_inject.core.marks import mark_of, places_of
from lora_inject.core.state import Injection, State, Trained
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.own import STATE, Place, own_tensor
from lora_inject.settings import BASE, BiasMode
from lora_inject.sharding import is_partial


class Look:
    """A model as it is when it is looked at.

    Attributes:
        model: the model.
        index: its modules with their paths.
    """

    def __init__(self, model: nn.Module, index: Index | None = None) -> None:
        self.model = model
        self.index = index or Index(model)

    def again(self) -> "Look":
        """The same modules as they are now, without another walk."""
        return Look(self.model, self.index)

    @cached_property
    def states(self) -> dict[nn.Module, State]:
        """What is known of each module that a call has reached."""
        found = {m: m.__dict__[STATE] for m in self.index.modules if STATE in m.__dict__}
        for module, state in list(found.items()):
            for name, noted in state.reach.noted:  # of a child that forgets it when it is copied
                child = dict(module._modules.items()).get(name)
                if child is not None:
                    found.setdefault(child, noted)
        return found

    @cached_property
    def own(self) -> dict[nn.Module, State]:
        """Of these the modules on which an adapter has something."""
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
        uses = {id(state.use): state.use for state in self.own.values()}
        return {name: weight for use in uses.values() for name, weight in use.weights.items()}

    @cached_property
    def adapters(self) -> list[tuple[nn.Module, Adapter]]:
        """Every adapter on every layer."""
        return [(m, adapter) for m, state in self.own.items() for adapter in state.adapters]

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
        path = self.index.path(layer)
        of_parameter = adapter.kind.name == "parameter"
        return f"{path}.{adapter.specs[0].weight}".lstrip(".") if of_parameter else path

    @cached_property
    def injections(self) -> tuple[Injection, ...]:
        """The calls that put the adapters there, each once."""
        reaches = {id(state.reach): state.reach for state in self.states.values()}
        found = {i.id: i for reach in reaches.values() for i in reach.injections}
        return tuple(found.values())

    @cached_property
    def roots(self) -> frozenset[int]:
        """The ids of the injections that were called on the model or inside of it."""
        return frozenset().union(*(state.reach.roots for state in self.states.values()))

    @cached_property
    def trained(self) -> list[tuple[nn.Module, Trained]]:
        """Every place of the model of which something trains in place."""
        return [(m, trained) for m, state in self.own.items() for trained in state.trained]

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
            for owned in (module._parameters, module._buffers):
                if len(owned):
                    for name, tensor in owned.items():
                        if tensor is not None:
                            places.setdefault(id(tensor), []).append((module, name))
        return places

    @cached_property
    def tied(self) -> set[int]:
        """The ids of the parameters and buffers that are registered in several places."""
        seen, tied = set[int](), set[int]()
        for module in self.index.modules:
            for owned in (module._parameters, module._buffers):
                if len(owned):
                    for tensor in owned.values():
                        (tied if id(tensor) in seen else seen).add(id(tensor))
        return tied - {id(None)}

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
            if self.states[module].inside(trained) == BASE and not is_partial(tensor):
                value = tensor.detach()
                same = value.shape != former.shape or id(former) in found
                if not same and not torch.equal(value, former.to(value.device, value.dtype)):
                    found[id(former)] = value.to("cpu", copy=True)
        return found

    @cached_property
    def in_full(self) -> dict[nn.Module, str]:
        """The modules that train in full, with the name of an adapter that does it."""
        return {m: name for m, state in self.states.items() for name in state.reach.in_full}

    # --- refusals: what is wrong, where, and what to do ---------------------------------------

    def require_unchanged(self) -> None:
        """Refuse a model that has other modules or adapters now than when it was looked at.

        Raises:
            LoRAInjectError: it has.
        """
        now = Look(self.model)
        same = now.index.is_like(self.index) and len(now.states) == len(self.states)
        if not same or any(now.states.get(m) is not state for m, state in self.states.items()):
            raise LoRAInjectError(
                "the model has changed since the plan was made.", remedy="Call plan again."
            )

    def require_adapters(self) -> None:
        """Refuse a model without adapters.

        Raises:
            LoRAInjectError: it has none.
        """
        if not self.own:
            raise LoRAInjectError("the model has no adapters.", remedy="Call inject first.")

    def require_whole(self, names: Iterable[str]) -> None:
        """Refuse a part of a model for what only the whole can answer.

        Raises:
            LoRAInjectError: one of these adapters reaches beyond the part.
        """
        for module, state in self.states.items():
            for injection in state.reach.injections:
                if injection.adapter in names and injection.id not in self.roots:
                    raise LoRAInjectError(
                        f"it is part of a larger model, on which the adapter {injection.adapter!r} "
                        "was put as a whole.",
                        path=self.index.path(module),
                        remedy="Call this on the model that inject was called on.",
                    )

    def require_one_mode(self, name: str, bias: BiasMode | None = None) -> None:
        """Refuse an adapter that parts of the model have with different bias modes.

        Args:
            name: the adapter's name.
            bias: the mode that it is to have; None for any.

        Raises:
            ArgumentError: it has several, or another one.
        """
        modes = {i.bias: None for i in self.injections if i.adapter == name}
        if len(modes) > 1:
            raise ArgumentError(
                f"parts of the model have {name!r} with different bias modes, {list(modes)}.",
                remedy="Call this on the parts, or first use it alone and freeze with one mode.",
            )
        if bias is not None and modes and bias not in modes:
            raise ArgumentError(
                f"bias={bias!r}, but {name!r} was injected with bias={next(iter(modes))!r}.",
                remedy="Use the same mode, and freeze(model, bias=...) to change it.",
            )

    def require_known(self, names: Iterable[str], argument: str) -> None:
        """Refuse names of adapters that are not there.

        Raises:
            ArgumentError: one is not; the message starts with the argument's name.
        """
        for name in names:
            if name not in self.known:
                raise ArgumentError(
                    f"{argument}: there is no adapter {name!r}; known: {sorted(self.known)}."
                )

    def require_awake(self) -> None:
        """Refuse a model whose adapters are merged, or inside a block that changes what runs.

        Raises:
            LoRAInjectError: they are.
        """
        self.require_no_block()
        self.require_unmerged()

    def require_unmerged(self) -> None:
        """Refuse a model whose adapters are merged.

        Raises:
            LoRAInjectError: they are.
        """
        for module, state in self.own.items():
            if state.merged:
                raise LoRAInjectError(
                    "its adapter is merged now.",
                    path=self.index.path(module),
                    remedy="Call unmerge first.",
                )

    def require_no_block(self, *, but_rows: bool = False) -> None:
        """Refuse a model inside a ``with disabled(...)`` or ``with per_row(...)`` block.

        Args:
            but_rows: allow the latter.

        Raises:
            LoRAInjectError: it is.
        """
        for module, state in self.own.items():
            if state.blocks and not (but_rows and state.rows is not None):
                raise LoRAInjectError(
                    f"it is inside a {state.block_text} block now.",
                    path=self.index.path(module),
                    remedy="Leave the with block first.",
                )

    def require_kept(self) -> None:
        """Refuse a model of which a former weight is gone, or has no place any more.

        Raises:
            LoRAInjectError: it was merged with ``keep=False``, or its place was replaced since.
        """
        for module, state in self.states.items():
            # Not `None in ...`, which asks each tensor whether it equals None: that takes 14 us.
            if state.merged and any(kept is None for kept in state.merged.former.values()):
                raise LoRAInjectError(
                    "its adapter was merged with keep=False, so that its weight is gone.",
                    path=self.index.path(module),
                    remedy="strip(model, merge=True) leaves it merged.",
                )
            for name in state.merged.former if state.merged else ():
                if own_tensor(module, name) is None:
                    raise LoRAInjectError(
                        f"its merged {name} is no parameter of it any more: something has pruned, "
                        "normed or parametrized it since.",
                        path=self.index.path(module),
                        remedy="Undo that first.",
                    )

    def require_intact(self) -> None:
        """Refuse a model of which something else has changed an adapted layer.

        Raises:
            LoRAInjectError: a class, a forward or the adapters' parameters were changed.
        """
        for path, layer in self.layers.items():
            _require_parameters(self, layer, self.states[layer])
            _require_intact(path, layer, self.states[layer])

    def require_switchable(self) -> None:
        """Refuse layers that cannot run an adapter: their class was replaced while none was in use.

        Raises:
            LoRAInjectError: there is one.
        """
        for module, state in self.own.items():
            _require_parameters(self, module, state)
            if state.adapters and not isinstance(module, LoRALayer) and not is_intact(module):
                raise LoRAInjectError(
                    f"its class became {type(module).__name__} while none of its adapters was in "
                    "use.",
                    path=self.index.path(module),
                    remedy="Put the adapters in use before that (fully_shard, parametrize).",
                )

    def require_restorable(self, places: Iterable[tuple[nn.Module, Trained]]) -> None:
        """Refuse to move what stands in these places where their former value cannot come back.

        Raises:
            LoRAInjectError: it is not known, has no place, its place has another shape or is
                sharded now, or is tied to one outside of the model.
        """
        for module, trained in places:
            _require_restorable(module, trained)
            self.require_inside(module, trained)

    def require_inside(self, module: nn.Module, trained: Trained) -> None:
        """Refuse to move what stands in some of the places where it is tied alone.

        Raises:
            LoRAInjectError: others are outside of the model.
        """
        if trained.former is not None and self._tied[id(trained.former)] < trained.places:
            raise LoRAInjectError(
                f"its {trained.name} is trained in {trained.places} tied places, of which some "
                "are outside.",
                path=self.index.path(module),
                remedy="Call this on the whole model.",
            )

    @cached_property
    def _tied(self) -> dict[int, int]:
        """How many places of the model each former value is for."""
        found: dict[int, int] = {}
        for _, trained in self.trained:
            found[id(trained.former)] = found.get(id(trained.former), 0) + 1
        return found


def _require_parameters(look: Look, layer: nn.Module, state: State) -> None:
    own = layer._parameters
    for adapter in state.adapters:
        for name in adapter.parameters:
            if name not in own:
                raise LoRAInjectError(
                    f"its {name} is no parameter of it any more: something has pruned, normed or "
                    "parametrized it since.",
                    path=look.index.path(layer),
                    remedy="Undo that first.",
                )


def _require_intact(path: str, layer: nn.Module, state: State) -> None:
    if is_fully_sharded(layer):
        raise LoRAInjectError(
            "FSDP shards and gathers its adapter and would go on doing so.",
            path=path,
            remedy="Save the adapter on all ranks, and load it into a model that is not sharded.",
        )
    if has_accelerate_hook(layer) and any(
        layer.get_parameter(name).is_meta for a in state.adapters for name in a.parameters
    ):
        raise LoRAInjectError(
            "accelerate has offloaded its adapter, and its hook would look for it.",
            path=path,
            remedy="Call accelerate.hooks.remove_hook_from_submodules(model) first.",
        )
    if "forward" in layer.__dict__ and not (
        has_accelerate_hook(layer) or "forward" in kept_forwards(layer)
    ):
        raise LoRAInjectError(
            "a forward was set on this very instance after inject, and it would go on adding.",
            path=path,
            remedy="Remove it first (del layer.forward).",
        )
    if not is_intact(layer):
        raise LoRAInjectError(
            f"its class is now {type(layer).__name__}, put there after inject.",
            path=path,
            remedy="Undo that first, or strip before it is done.",
        )


def _require_restorable(module: nn.Module, trained: Trained) -> None:
    tensor, former = own_tensor(module, trained.name), trained.former
    what = f"the former value of {trained.text(module)}"
    if trained.is_parameter and tensor is None:
        raise LoRAInjectError(
            f"{what} has no place any more: it is no parameter of its module now.",
            remedy="Undo what replaced it (a parametrization, say) first.",
        )
    if former is not None and former.is_meta and tensor is not None and not tensor.is_meta:
        raise LoRAInjectError(
            f"{what} is not known: the model was on the meta device when inject was called.",
            remedy="Load the base weights, call reset_lora_parameters, then train.",
        )
    if is_fully_sharded(module):
        raise LoRAInjectError(
            f"{what} cannot be put back: FSDP manages the parameter now.",
            remedy="Save the adapter on all ranks, and load it into a model without FSDP.",
        )
    if not trained.is_parameter or tensor is None or former is None:
        return
    if tensor.shape != former.shape:
        raise LoRAInjectError(
            f"{what} has the shape {tuple(former.shape)}, and the parameter now "
            f"{tuple(tensor.shape)}.",
            remedy="Undo the resizing first.",
        )
