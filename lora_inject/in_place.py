"""Parameters and buffers of the base that train in place, each adapter with a tensor of its own.

Biases and ``train_also`` modules belong to the adapter that trains them. The first one trains the
base's own tensor, whose former value is kept; every further one gets a tensor of its own. What is
not in use waits on the same module, under a name like ``lora_2_fr_bias_kept``, so that it is moved,
cast, copied and saved with the model; swapping exchanges the objects, so that a graph that was made
with one stays valid.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import LoRAInjectError
from lora_inject.placements import fill, is_distributed, is_fully_sharded, shards, whole
from lora_inject.settings import BASE  # under it the base's own tensor waits

Place = tuple[nn.Module, str]


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the module itself, or None."""
    for owned in (module._parameters, module._buffers):
        if name in owned:  # and no .get: scripted modules have other mappings
            return owned[name]
    return None


def waiting_name(name: str, adapter: str) -> str:
    """The name under which an adapter's tensor waits while it is not in its place."""
    # With the length no two adapters share one; and no bias would be called so.
    return f"lora_{len(adapter)}_{adapter}_{name}_kept"


def show(look: Any, wanted: "dict[Slot, str | None]") -> None:
    """Put an adapter's tensor, or the former value, into each slot, wherever it is tied now.

    Raises:
        LoRAInjectError: a tensor has no place any more, or no value; nothing has changed then.
    """
    moving = {slot: name for slot, name in wanted.items() if slot.inside != name}
    for slot in moving:
        slot.check_restorable()
    places = look.tensor_places if moving else {}
    former = {slot: slot.inside for slot in moving}
    try:
        for slot, name in moving.items():
            others = [p for p in places.get(id(slot.current), []) if p != slot.places[0]]
            slot.places = [slot.places[0], *others]
            slot.show(name)
    except BaseException:
        for slot, name in former.items():
            slot.show(name)
        raise


@dataclass(eq=False)
class Slot:
    """One parameter or buffer that adapters train.

    Attributes:
        places: the modules and names where it is registered; several where it is tied.
        former: its value before any adapter, in CPU memory; None for an empty buffer.
        trains: the adapters that own a tensor for it, and whether it trains when they do.
        original: the adapter that trains the base's own tensor; None while that holds the former
            value.
        inside: the adapter whose tensor stands in the place; None for the former value.
        is_parameter: whether it is a parameter, which cannot come and go as a buffer may.
    """

    places: list[Place]
    former: Tensor | None = None
    trains: dict[str, bool] = field(default_factory=dict)
    original: str | None = None
    inside: str | None = None
    is_parameter: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_parameter = isinstance(self.current, nn.Parameter)
        self.keep_former()

    @property
    def current(self) -> Tensor | None:
        """The tensor in the place."""
        return own_tensor(*self.places[0])

    @property
    def waiting(self) -> list[Place]:
        """Where its tensors wait that are not in the place."""
        module, name = self.places[0]
        keys = [waiting_name(name, adapter) for adapter in (*self.trains, BASE)]
        return [(module, key) for key in keys if own_tensor(module, key) is not None]

    @property
    def text(self) -> str:
        """What it is, for errors."""
        module, name = self.places[0]
        return f"{name} of a {type(module).__name__}"

    def keep_former(self) -> None:
        """Keep a copy of the value in the place: the former one, while no adapter is inside.

        On the meta device there is no value yet; ``keep_unknown`` asks again.
        """
        tensor = self.current
        if tensor is not None:
            value = tensor.detach()
            tensor = value.to("meta") if value.is_meta else whole(value).to("cpu", copy=True)
        self.former = tensor

    def keep_unknown(self) -> None:
        """Keep the former value if it was on the meta device and has come into being since."""
        if not self._is_unknown():
            return
        self.keep_former()
        for adapter in self.trains:
            tensor = self.tensor(adapter)
            if adapter != self.inside and tensor is not None and self.former is not None:
                fill(tensor, self.former)

    def tensor(self, adapter: str) -> Tensor | None:
        """An adapter's tensor, wherever it is."""
        module, name = self.places[0]
        return own_tensor(module, name if self.inside == adapter else waiting_name(name, adapter))

    def own(self, adapter: str, trains: bool, inside: bool) -> None:
        """Give an adapter a tensor, with the former value, if it has none.

        Args:
            adapter: the adapter's name.
            trains: whether the tensor trains when the adapter does.
            inside: whether it is to stand in the place now, which no other adapter may hold.
        """
        if adapter not in self.trains:
            if inside and self.original is None:
                self.original = self.inside = adapter
            else:
                self._wait(adapter, self._stand_in())
        self.trains[adapter] = trains
        if inside:
            self.show(adapter)

    def show(self, adapter: str | None) -> None:
        """Put an adapter's tensor in the place, or one with the former value."""
        if adapter == self.inside:
            return
        leaving, coming = self.current, self._fetch(adapter)
        if self.inside is not None or self.original is None:  # else a stand-in, of no more use
            self._wait(self.inside or BASE, leaving)
        for module, name in self.places:
            _put(module, name, coming)
        self.inside = adapter

    def disown(self, adapter: str) -> None:
        """Take an adapter's tensor away; the base's own one gets its former value back."""
        if adapter == self.original:
            tensor = self.tensor(adapter)
            if self.inside == adapter:
                self.inside = None
            else:
                self._unwait(adapter)
                if self.inside is None:
                    for module, name in self.places:
                        _put(module, name, tensor)
                else:
                    self._wait(BASE, tensor)
            self.original = None
            self._restore_former()
        elif adapter in self.trains:
            if self.inside == adapter:
                self.show(None)
            self._unwait(adapter)
        self.trains.pop(adapter, None)

    def check_restorable(self) -> None:
        """Refuse before anything is changed where the former value cannot be put back.

        Raises:
            LoRAInjectError: it is not known, or the place has another shape or is sharded now.
        """
        tensor = self.current
        what = f"the former value of {self.text}"
        if self.is_parameter and tensor is None:
            raise LoRAInjectError(
                f"{what} has no place any more: it is no parameter of its module now.",
                remedy="Undo what replaced it (a parametrization, say) first.",
            )
        if self._is_unknown():
            raise LoRAInjectError(
                f"{what} is not known: the model was on the meta device when inject was called.",
                remedy="Load the base weights, call reset_lora_parameters, then train.",
            )
        if is_fully_sharded(self.places[0][0]):
            raise LoRAInjectError(
                f"{what} cannot be put back: FSDP manages the parameter now.",
                remedy="Save the adapter on all ranks, and load it into a model without FSDP.",
            )
        if not isinstance(tensor, nn.Parameter) or self.former is None:
            return
        if tensor.shape != self.former.shape:
            raise LoRAInjectError(
                f"{what} has the shape {tuple(self.former.shape)}, and the parameter now "
                f"{tuple(tensor.shape)}.",
                remedy="Undo the resizing first.",
            )

    def _is_unknown(self) -> bool:
        tensor = self.current
        known = self.former is None or not self.former.is_meta
        return not known and tensor is not None and not tensor.is_meta

    def _stand_in(self) -> Tensor | None:
        """A new tensor with the former value, like the one in the place."""
        if self.former is None:
            return None
        like = self.former if self.current is None else self.current
        with torch.inference_mode(False):  # where it could never train
            value = self.former.to(like.device, like.dtype, copy=True)
            if is_distributed(like):
                value = shards(value, like)
            is_parameter = isinstance(like, nn.Parameter)
            return nn.Parameter(value, requires_grad=False) if is_parameter else value

    def _fetch(self, adapter: str | None) -> Tensor | None:
        if adapter is None and self.original is not None:
            return self._stand_in()
        return self._unwait(adapter or BASE)

    def _wait(self, adapter: str, tensor: Tensor | None) -> None:
        module, name = self.places[0]
        waiting = waiting_name(name, adapter)
        if name in module._parameters:
            module.register_parameter(waiting, tensor)  # type: ignore[arg-type]
        else:
            saved = name not in module._non_persistent_buffers_set
            module.register_buffer(waiting, tensor, persistent=saved)

    def _unwait(self, adapter: str) -> Tensor | None:
        module, name = self.places[0]
        waiting = waiting_name(name, adapter)
        module._non_persistent_buffers_set.discard(waiting)
        owned = module._parameters if waiting in module._parameters else module._buffers
        return owned.pop(waiting)

    @torch.no_grad()
    def _restore_former(self) -> None:
        """Write the former value into the base's own tensor; nobody owns it, so it is frozen."""
        module, name = self.places[0]
        key = name if self.inside is None else waiting_name(name, BASE)
        tensor, value = own_tensor(module, key), self.former
        if isinstance(tensor, nn.Parameter):
            if value is not None and not value.is_meta:
                fill(tensor, value)
            tensor.requires_grad_(False)
            tensor.grad = None
        elif key in module._buffers:  # which may have come, gone or grown since
            if value is None or value.is_meta:
                module._buffers[key] = None if value is None else tensor
            elif tensor is None or tensor.shape != value.shape:
                module._buffers[key] = value if tensor is None else value.to(tensor.device)
            else:
                tensor.copy_(value)


def _put(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    if name in module._parameters:
        setattr(module, name, tensor)  # so that modules that keep lists of them hear of it (LSTM)
    else:
        module._buffers[name] = tensor
