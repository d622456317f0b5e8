"""A look at a model: what it is, and what a call on it cannot do.

Every call looks once and passes the look down. A look changes nothing; after a change ``again``
looks at the same modules anew. What a call cannot do is said here, by path, before it does it.
"""

from collections.abc import Iterable

from torch import nn

from lora_inject.core.facts import Facts
from lora_inject.core.layer import LoRALayer
from lora_inject.core.layer_checks import (
    require_intact,
    require_parameters,
    require_restorable,
    require_switchable,
)
from lora_inject.core.state_parts import Trained
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.own import own_tensor
from lora_inject.printing import few
from lora_inject.settings import BiasMode


class Look(Facts):
    """A model as it is when it is looked at, with the refusals that calls need.

    Each ``require_...`` raises an error with the path and the remedy, or returns nothing.
    """

    def again(self) -> "Look":
        """The same modules as they are now, without another walk."""
        return Look(self.model, self.index)

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
        if self.adapted:
            return
        calls = [call for state in self.states.values() for call in state.reach.injections]
        if lost := sorted({path for call in calls for path in call.layers}):
            raise LoRAInjectError(
                f"the model has no adapters any more: {few(lost)} were replaced or taken out "
                "since.",
                remedy="Put them back, or call inject on what took their place.",
            )
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
        for module, state in self.adapted.items():
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
        for module, state in self.adapted.items():
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
            require_parameters(path, layer, self.states[layer])
            require_intact(path, layer, self.states[layer])

    def require_switchable(self) -> None:
        """Refuse layers that cannot run an adapter after what was done while none was in use.

        Raises:
            LoRAInjectError: a class was replaced, a forward that would bypass the adapter was kept,
                or the adapter was rounded to 8 bits.
        """
        for module, state in self.adapted.items():
            require_parameters(self.index.path(module), module, state)
            if state.adapters and not isinstance(module, LoRALayer):
                require_switchable(self.index.path(module), module, state)

    def require_restorable(self, places: Iterable[tuple[nn.Module, Trained]]) -> None:
        """Refuse to move what stands in these places where their former value cannot come back.

        Raises:
            LoRAInjectError: it is not known, has no place, its place has another shape or is
                sharded now, or is tied to one outside of the model.
        """
        for module, trained in places:
            require_restorable(module, trained)
            self.require_all_places(module, trained)

    def require_all_places(self, module: nn.Module, trained: Trained) -> None:
        """Refuse to move what is tied to places that are not in the model, and would stay behind.

        Raises:
            LoRAInjectError: it is.
        """
        if trained.former is not None and self.tied_formers[id(trained.former)] < trained.places:
            raise LoRAInjectError(
                f"its {trained.name} is trained in {trained.places} tied places, of which some "
                "are outside.",
                path=self.index.path(module),
                remedy="Call this on the whole model.",
            )
