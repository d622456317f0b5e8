"""A plan's content becomes states of modules and tensors that they name; nothing is changed."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.arithmetic import starting_values as initial
from lora_inject.changes.edits import Edit, value_edit
from lora_inject.changes.statistics import is_held
from lora_inject.core.adapter import Adapter
from lora_inject.core.arranging import stand_in
from lora_inject.core.company import company, joined, writes_to
from lora_inject.core.look import Look
from lora_inject.core.site import Site
from lora_inject.core.starting import pair_parameters
from lora_inject.core.state import Fresh, State
from lora_inject.core.state_parts import Before, Injection, Reach, Trained, Use
from lora_inject.own import Place, own_tensor
from lora_inject.settings import BiasMode
from lora_inject.sharding import fill, whole


class Content(NamedTuple):
    """What an adapter trains besides its A and B, and the values that it has where it is loaded.

    Attributes:
        bias: the bias mode.
        train_also: the modules that train in full, by path.
        in_place: what trains in place: True for a parameter, False for a buffer that a forward
            updates.
        values: tensors by role, by path and prefix of each pair; None for starting values.
        tensors: values of what trains in place; what is not there keeps the base's.
        joins: whether the adapter joins those in use and trains; else it waits for ``use``.
        beside: the adapters that were in use while it trained.
        said: what its file says besides, as JSON.
        left: what a pattern would have adapted and could not, by path, with the reasons.
        base: what the file says of the weights that it was made for, by path.
    """

    bias: BiasMode = "none"
    train_also: Mapping[str, nn.Module] = {}
    in_place: Mapping[Place, bool] = {}
    values: Mapping[tuple[str, str], Mapping[str, Tensor]] | None = None
    tensors: Mapping[Place, Tensor] = {}
    joins: bool = True
    beside: frozenset[str] = frozenset()
    said: str = ""
    left: Mapping[str, str] = {}
    base: Mapping[str, Mapping[str, Any]] = {}


class Adaptation:
    """What an adapter makes of a model.

    Attributes:
        states: the new state of every module.
        fresh: the tensors that it brings.
        values: what is written into tensors that are there.
    """

    def __init__(self, states: dict[nn.Module, State]) -> None:
        self.states = states
        self.fresh: Fresh = {}
        self.values: list[Edit] = []


def adaptation(
    look: Look, sites: tuple[Site, ...], name: str, seed: int | None, content: Content
) -> Adaptation:
    """The states of a model that an adapter has been put on.

    Args:
        look: the model.
        sites: the layers.
        name: the adapter's name.
        seed: of the starting values; None draws one.
        content: what else the adapter is.
    """
    seed = initial.draw_seed() if seed is None else seed
    injection = Injection(
        secrets.randbits(63),
        name,
        content.bias,
        content.said,
        layers=frozenset(site.path for site in sites),
        in_full=frozenset(content.train_also),
        left=content.left,
        base=content.base,
    )
    made = Adaptation(reached(look, injection))
    leaders: dict[str, list[dict[str, nn.Parameter]]] = {}
    adapters: dict[nn.Module, tuple[Adapter, ...]] = {}
    generator = torch.Generator(device="cpu")
    with torch.inference_mode(False):  # tensors made in it could never train
        for site in sites:
            adapter = Adapter(
                name, site.settings, site.kind, site.way, site.specs, site.pattern, site.path,
                seed, site.follows,
            )  # fmt: skip
            adapters[site.module] = (*adapters.get(site.module, ()), adapter)
            if site.follows:
                pairs = leaders[site.follows]
            else:
                pairs = pair_parameters(site, adapter, content.values, content.joins, generator)
            leaders[site.path] = pairs
            own = made.fresh.setdefault(site.module, {})
            for (_, names), pair in zip(adapter.pairs, pairs, strict=True):
                for role, key in names.items():
                    own[key, name] = pair[role]
        own_in_place(look, made, name, content.in_place, content.joins)
        _fill(made, name, content.tensors)
    train_in_full(look, made.states, name, content.train_also.values())
    _put_on_layers(look, made, name, adapters, content)
    return made


def reached(look: Look, injection: Injection | None = None) -> dict[nn.Module, State]:
    """The state of every module of a model after a call on it.

    Args:
        look: the model.
        injection: the call, where it puts an adapter into the model. Without one, those that are
            known reach what has been added to the model since.
    """
    reaches: dict[int, Reach] = {}
    alike: dict[Before, State] = {}  # frozen modules that tell the same are one value
    states = dict[nn.Module, State]()
    new = () if injection is None else (injection,)
    first = Reach(new or look.injections)
    for module in look.index.modules:
        old = look.states.get(module)
        if old is None:
            before = _before(look, module)
            if before not in alike:
                alike[before] = State(before, first)
            states[module] = alike[before]
        elif new:
            reach = old.reach
            if id(reach) not in reaches:
                reaches[id(reach)] = reach._replace(injections=(*reach.injections, *new))
            states[module] = old.change(reach=reaches[id(reach)])
        else:
            states[module] = old
    if injection is not None:
        root = states[look.model]
        reach = root.reach._replace(roots=root.reach.roots | {injection.id})
        states[look.model] = root.change(reach=reach)
    return states


def _before(look: Look, module: nn.Module) -> Before:
    """What a module is that no call has reached yet."""
    own = module._parameters
    named = [(n, look.former_flag(p)) for n, p in own.items() if p is not None] if len(own) else ()
    return Before(type(module), module.training, tuple(named), is_held(module))


def train_in_full(
    look: Look, states: dict[nn.Module, State], name: str, tops: Iterable[nn.Module]
) -> None:
    """Write into the states which modules an adapter trains in full."""
    for top in tops:
        for module in look.index.below(top):
            reach = states[module].reach
            in_full = tuple(dict.fromkeys((*reach.in_full, name)))
            marked = tuple(dict.fromkeys((*reach.tops, name))) if module is top else reach.tops
            reach = reach._replace(in_full=in_full, tops=marked)
            states[module] = states[module].change(reach=reach)


def own_in_place(
    look: Look, made: Adaptation, name: str, tensors: Mapping[Place, bool], joins: bool
) -> None:
    """Make an adapter an owner of what trains in place, wherever that is tied.

    Args:
        look: the model.
        made: its new states, and tensors that they name.
        name: the adapter's name.
        tensors: the places, and whether what stands there trains itself or only moves.
        joins: whether the adapter's tensors are to stand in the places now.
    """
    formers: dict[int, Tensor] = {}  # by what stands in the place: tied places share one value
    copies: dict[int, Tensor | None] = {}  # by the former value
    done: set[Place] = set()
    loaded = look.loaded_formers(look.trained)
    for (module, place), trains in tensors.items():
        tensor = own_tensor(module, place)
        tied = look.tensor_places[id(tensor)] if tensor is not None else [(module, place)]
        for owner, key in tied:
            if (owner, key) in done:
                continue
            done.add((owner, key))
            state = made.states[owner] = made.states[owner].with_formers(loaded)
            known = state.find(key) or _untouched(tensor, key, owner, len(tied), formers)
            if name not in known.owners:
                if joins and known.original is None:
                    known = replace(known, original=name)
                else:
                    if id(known.former) not in copies:
                        copies[id(known.former)] = stand_in(known, tensor)
                    made.fresh.setdefault(owner, {})[key, name] = copies[id(known.former)]
            known = replace(known, owners={**known.owners, name: trains})
            others = tuple(trained for trained in state.trained if trained.name != key)
            made.states[owner] = state.change(trained=(*others, known))


def _untouched(
    tensor: Tensor | None, name: str, module: nn.Module, places: int, formers: dict[int, Tensor]
) -> Trained:
    """A place that no adapter has trained yet."""
    if tensor is not None and id(tensor) not in formers:
        formers[id(tensor)] = former_value(tensor)
    former = None if tensor is None else formers[id(tensor)]
    return Trained(name, name in module._parameters, former, places, {})


def former_value(tensor: Tensor) -> Tensor:
    """A copy of a value to keep; there is none yet on the meta device, until values are reset."""
    value = tensor.detach()
    return value.to("meta") if value.is_meta else whole(value).to("cpu", copy=True)


def _fill(made: Adaptation, name: str, tensors: Mapping[Place, Tensor]) -> None:
    for (module, place), value in tensors.items():
        tensor = made.fresh.get(module, {}).get((place, name))
        if tensor is not None:
            fill(tensor, value)
        else:
            own = own_tensor(module, place)
            assert own is not None
            made.values.append(value_edit(own, value.clone()))


def _put_on_layers(
    look: Look,
    made: Adaptation,
    name: str,
    adapters: Mapping[nn.Module, tuple[Adapter, ...]],
    content: Content,
) -> None:
    """Put an adapter on its layers, and let it run and train wherever it has something."""
    uses: dict[int, Use] = {}
    beside = {**company(look), **({name: content.beside} if content.beside else {})}
    writes = sum(
        writes_to(t for (key, _), t in made.fresh[module].items() if t is not None and key in names)
        for module, own in adapters.items()
        for names in [own[-1].parameters]
    )
    for module, state in made.states.items():
        own, now = adapters.get(module, ()), state.use
        if own or (state.is_adapted and name in state.on_it):
            if id(now) not in uses:
                known = now._replace(beside=beside)
                uses[id(now)] = joined(look, known, name, writes) if content.joins else known
            now = uses[id(now)]
        if own or now is not state.use:
            made.states[module] = state.change(adapters=(*state.adapters, *own), use=now)
