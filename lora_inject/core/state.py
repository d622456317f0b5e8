"""What is known of one module, as a value that stands on the module itself.

A call makes new states out of old ones and hands them to ``commit``, which makes the modules so.
A state names tensors and never holds them, so that whatever replaces them (``.to("meta")``,
``load_state_dict(assign=True)``, FSDP) is right; it holds former *values* alone. And it refers to
no other module, so that a part of a model can be copied, pickled and stripped on its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from lora_inject.core.adapter import Adapter, Term
from lora_inject.core.state_parts import Before, Block, Merged, Reach, Trained, Use, waiting_name
from lora_inject.errors import LoRAInjectError
from lora_inject.own import STATE
from lora_inject.settings import BASE

_NOTHING = Use({}, frozenset())


class State:
    """What is known of a module.

    Attributes:
        before: what it was.
        reach: the calls that reached it.
        use: which adapters run and train.
        adapters: those with an A and a B on it.
        trained: what of it trains in place.
        merged: what is merged.
        blocks: the blocks that it is inside of, the outermost first.
        running: what is added now, in the way of a plain batch (worked out from the others).
        rows: what computes one adapter for each row of a batch, in a block that asks for it (worked
            out from the blocks).
    """

    before: Before
    reach: Reach
    use: Use
    adapters: tuple[Adapter, ...]
    trained: tuple[Trained, ...]
    merged: Merged | None
    blocks: tuple[Block, ...]
    running: tuple[Term, ...]
    rows: Any

    # Not a NamedTuple, which torch.export takes apart, nor a frozen dataclass: a hot swap makes
    # hundreds of them, and this is the fastest to make of what cannot be changed.

    def __init__(
        self,
        before: Before,
        reach: Reach,
        use: Use = _NOTHING,
        adapters: tuple[Adapter, ...] = (),
        trained: tuple[Trained, ...] = (),
        merged: Merged | None = None,
        blocks: tuple[Block, ...] = (),
    ) -> None:
        own = self.__dict__
        own["before"], own["reach"], own["use"] = before, reach, use
        own["adapters"], own["trained"] = adapters, trained
        own["merged"], own["blocks"] = merged, blocks
        # Layers ask what runs far more often than it changes.
        own["running"], own["rows"] = (), None
        if blocks:
            if all(block.rows is not None for block in blocks):
                own["rows"] = blocks[-1].rows
        elif adapters:
            folded = merged.adapters if merged else ()
            running = (a for a in adapters if a.name not in folded)
            own["running"] = terms(running, use.weights)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a state is a value: make another one with change().")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles of any module come here, whatever class it has now.
        if self.blocks:
            raise LoRAInjectError(
                f"the model is inside a {self.block_text} block, and a copy would stay in it.",
                remedy="Leave the with block first.",
            )
        return super().__reduce_ex__(protocol)

    def change(
        self,
        *,
        reach: Reach | None = None,
        use: Use | None = None,
        adapters: tuple[Adapter, ...] | None = None,
        trained: tuple[Trained, ...] | None = None,
        merged: Merged | Literal[False] | None = False,
        blocks: tuple[Block, ...] | None = None,
    ) -> "State":
        """The same state with other values of some fields."""
        return State(
            self.before,
            self.reach if reach is None else reach,
            self.use if use is None else use,
            self.adapters if adapters is None else adapters,
            self.trained if trained is None else trained,
            self.merged if merged is False else merged,
            self.blocks if blocks is None else blocks,
        )

    def with_formers(self, formers: Mapping[int, Tensor]) -> "State":
        """The state with other former values, by the id of those that it has."""
        if not formers:
            return self
        trained = (replace(t, former=formers.get(id(t.former), t.former)) for t in self.trained)
        return self.change(trained=tuple(trained))

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter has something on this module, and not only around it."""
        return bool(self.adapters or self.trained)

    @property
    def on_it(self) -> set[str]:
        """The adapters that have something on this module."""
        owners = {name for trained in self.trained for name in trained.owners}
        return owners | {adapter.name for adapter in self.adapters}

    @property
    def block_text(self) -> str:
        """The block that decides, in words."""
        return "per_row" if self.rows is not None else "disabled"

    def holder(self, trained: Trained) -> str:
        """Whose tensor stands in a place: an adapter's name, or ``BASE`` for the former value."""
        if self.blocks:
            return BASE
        return next((name for name in self.use.weights if name in trained.owners), BASE)

    def homes(self, trained: Trained) -> dict[str, str]:
        """Where the tensors of a place are, by owner.

        The former value has none while an adapter has the base's own tensor: where no adapter is
        holds the place then, a stand-in is made for it.
        """
        holder = self.holder(trained)
        owners = (*trained.owners, *(() if trained.original else (BASE,)))
        return {
            who: trained.name if who == holder else waiting_name(trained.name, who)
            for who in owners
        }

    def statistics_move(self) -> bool:
        """Whether the module's running statistics move in training mode."""
        return any(a in self.use.weights and a in self.use.trains for a in self.reach.in_full)

    def find(self, name: str) -> Trained | None:
        """What of it trains in place under this name."""
        return next((trained for trained in self.trained if trained.name == name), None)


# What a call hands to ``commit``.
States = Mapping[nn.Module, State | None]  # the new ones; None for a module as it was before us
Fresh = dict[nn.Module, dict[tuple[str, str], Tensor | None]]  # new tensors by name and owner


def terms(adapters: Iterable[Adapter], weights: Mapping[str, float]) -> tuple[Term, ...]:
    """What those of the adapters that are in use add, with their weights."""
    found: tuple[Term, ...] = ()
    for adapter in adapters:
        weight = weights.get(adapter.name)
        if weight is not None:
            found += adapter.terms if weight == 1.0 else adapter.weighted_terms(weight)
    return found


def state_of(module: nn.Module) -> State | None:
    """What is known of a module; None for one that no call has reached."""
    state: State | None = module.__dict__.get(STATE)
    return state


def adapters_of(module: nn.Module) -> tuple[Adapter, ...]:
    """The adapters on a module, whether they run or not."""
    state = state_of(module)
    return state.adapters if state else ()


def path_of(module: nn.Module) -> str:
    """The path under which a module was adapted, for errors of its own; "" where it is not."""
    return next((adapter.path for adapter in adapters_of(module)), "")


def owned(state: State | None) -> Iterator[tuple[str, str, bool]]:
    """(name, owner, whether it trains) of every tensor on a module that adapters put there."""
    if state is None:
        return
    trains = state.use.trains
    for adapter in state.adapters:
        for name, can_train in adapter.parameters.items():
            yield name, adapter.name, can_train and adapter.name in trains
    for trained in state.trained:
        homes = state.homes(trained)
        for who, name in homes.items():
            yield name, who, who in trains and trained.owners.get(who, False)
        if trained.name not in homes.values():
            yield trained.name, BASE, False  # a stand-in
