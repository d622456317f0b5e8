"""What a model was before it was adapted, and the way back: the only code that restores.

A ``Record`` is one private attribute of the module that ``inject`` was called on. It refers to
modules by object and to parameters by their owner and name, so it follows deep copies, pickling,
``.to()`` and wrappers, which rename paths or replace parameters but keep modules.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_inject.errors import LoRAInjectError
from lora_inject.kinds.base import is_distributed
from lora_inject.layer import Adapter, adapters_of, detach, is_asleep, is_intact, merged_weights
from lora_inject.settings import BiasMode
from lora_inject.statistics import has_statistics, hold, is_held

_T = TypeVar("_T")
_RECORD = "_lora_inject_record"


@dataclass
class Before:
    """What modules were before one call changed them: its undo, and its share of the record."""

    training: dict[nn.Module, bool] = field(default_factory=dict)
    requires_grad: dict[nn.Module, dict[str, bool]] = field(default_factory=dict)
    held: dict[nn.Module, bool] = field(default_factory=dict)
    values: dict[nn.Module, dict[str, Tensor | None]] = field(default_factory=dict)

    def keep_flags(self, modules: Iterable[nn.Module]) -> None:
        """Keep each module's ``training``, its parameters' ``requires_grad``, and what is held."""
        for module in modules:
            self.training[module] = module.training
            self.requires_grad[module] = {
                name: p.requires_grad for name, p in module._parameters.items() if p is not None
            }
            if has_statistics(module):
                self.held[module] = is_held(module)

    def keep_value(self, module: nn.Module, name: str) -> None:
        """Keep a copy, in CPU memory, of a parameter or buffer that is going to change.

        On the meta device there is no value yet; ``reset_lora_parameters`` asks again.
        """
        tensor = own_tensor(module, name)
        if tensor is not None:
            tensor = tensor.detach().to("meta" if tensor.is_meta else "cpu", copy=True)
        self.values.setdefault(module, {})[name] = tensor

    def keep_unknown_values(self) -> None:
        """Keep what was on the meta device when it was to be kept, and has values now."""
        for module, kept in self.values.items():
            for name, value in kept.items():
                if _is_unknown(value, own_tensor(module, name)):
                    self.keep_value(module, name)

    def check_restorable(self) -> None:
        """Refuse before anything is changed where a former value cannot be put back.

        Raises:
            LoRAInjectError: a value is not known, or its place has another shape or is sharded now.
        """
        for module, kept in self.values.items():
            for name, value in kept.items():
                tensor = own_tensor(module, name)
                what = f"the former value of {name} of a {type(module).__name__}"
                if _is_unknown(value, tensor):
                    raise LoRAInjectError(
                        f"{what} is not known: the model was on the meta device when inject was "
                        "called.",
                        remedy="Load the base weights, call reset_lora_parameters, then train.",
                    )
                if tensor is not None and is_distributed(tensor):
                    raise LoRAInjectError(
                        f"{what} cannot be put back: the parameter is sharded (DTensor) now.",
                        remedy="Gather the full model first, or strip before sharding.",
                    )
                if not isinstance(tensor, nn.Parameter) or value is None:
                    continue
                if tensor.shape != value.shape:
                    raise LoRAInjectError(
                        f"{what} has the shape {tuple(value.shape)}, and the parameter now "
                        f"{tuple(tensor.shape)}.",
                        remedy="Undo the resizing first.",
                    )

    def restore(self) -> None:
        """Put everything back; parameters keep their identity, values are cast to their dtype."""
        for module, training in self.training.items():
            module.training = training
        for module, flags in self.requires_grad.items():
            for name, flag in flags.items():
                parameter = own_tensor(module, name)
                if parameter is not None:
                    parameter.requires_grad_(flag)
        for module, held in self.held.items():
            hold(module, held)
        with torch.no_grad():
            for module, kept in self.values.items():
                for name, value in kept.items():
                    _put_back(module, name, value)

    def precede(self, older: "Before") -> None:
        """Take over what an earlier call kept; where both know a thing, the earlier is right."""
        self.training = self.training | older.training
        self.held = self.held | older.held
        self.requires_grad = _merged(self.requires_grad, older.requires_grad)
        self.values = _merged(self.values, older.values)


def _merged(
    newer: dict[nn.Module, dict[str, _T]], older: dict[nn.Module, dict[str, _T]]
) -> dict[nn.Module, dict[str, _T]]:
    return {m: newer.get(m, {}) | older.get(m, {}) for m in {**newer, **older}}


def _is_unknown(value: Tensor | None, tensor: Tensor | None) -> bool:
    return value is not None and value.is_meta and tensor is not None and not tensor.is_meta


def _put_back(module: nn.Module, name: str, value: Tensor | None) -> None:
    tensor = own_tensor(module, name)
    if isinstance(tensor, nn.Parameter):
        if value is not None and not value.is_meta:
            tensor.copy_(value)
        tensor.grad = None
    elif name in module._buffers:  # which may have come, gone or grown since
        if value is None or value.is_meta:
            module._buffers[name] = None if value is None else tensor
        elif tensor is None or tensor.shape != value.shape:
            module._buffers[name] = value if tensor is None else value.to(tensor.device)
        else:
            tensor.copy_(value)


@dataclass
class Record:
    """Everything ``inject`` did to a model.

    Attributes:
        adapters: each adapter with its layer, by the path of its target.
        before: what the model was.
        bias: the bias mode in force.
        train_also: the modules that train in full, as they were selected.
        created: when, so that records of nested modules are undone in the right order.
    """

    adapters: dict[str, tuple[nn.Module, Adapter]] = field(default_factory=dict)
    before: Before = field(default_factory=Before)
    bias: BiasMode = "none"
    train_also: list[nn.Module] = field(default_factory=list)
    created: int = field(default_factory=time.time_ns)

    def adopt(self, older: "Record", path: str) -> None:
        """Take over an earlier record, of the same module or of a submodule at the path."""
        prefix = f"{path}." if path else ""
        self.adapters |= {prefix + name: pair for name, pair in older.adapters.items()}
        self.before.precede(older.before)
        self.train_also += older.train_also

    def check_restorable(self, values: bool = True) -> None:
        """Refuse before anything is changed.

        Args:
            values: whether former values are to come back too.

        Raises:
            LoRAInjectError: something else has changed a layer's class since, or a former value
                cannot be put back.
        """
        for path, (layer, _) in self.adapters.items():
            if not is_intact(layer):
                raise LoRAInjectError(
                    f"its class is now {type(layer).__name__}, put there after inject.",
                    path=path,
                    remedy="Undo that first, or strip before it is done.",
                )
            if is_asleep(layer) and not merged_weights(layer):
                raise LoRAInjectError(
                    "its adapter is disabled now.", path=path, remedy="Leave the with block first."
                )
            if values:
                require_kept(path, layer)
        if values:
            self.before.check_restorable()

    def forget_values(self) -> None:
        """Give up the former values, so that restoring leaves what was merged and trained."""
        self.before.values = {}
        for layer, _ in self.adapters.values():
            merged_weights(layer).clear()

    def restore(self) -> None:
        """Make the model what it was."""
        for layer, adapter in self.adapters.values():
            put_back_merged(layer)
            detach(layer, adapter)
        self.before.restore()


def require_kept(path: str, layer: nn.Module) -> None:
    """Refuse a layer whose former weight is gone.

    Raises:
        LoRAInjectError: it was merged with ``keep=False``.
    """
    if None in merged_weights(layer).values():
        raise LoRAInjectError(
            "its adapter was merged with keep=False, so that its weight is gone.",
            path=path,
            remedy="strip(model, merge=True) leaves it merged.",
        )


def put_back_merged(layer: nn.Module) -> None:
    """Give the layer's merged weights their former values, bit for bit."""
    kept = merged_weights(layer)
    for name, former in kept.items():
        weight = own_tensor(layer, name)
        assert former is not None, "check_restorable has refused this"
        assert weight is not None
        exchange(weight, former)
    kept.clear()


@torch.no_grad()
def exchange(tensor: Tensor, value: Tensor) -> None:
    """Make a value that of a tensor by its storage, cast where ``.to()`` came between.

    What the tensor held is not written to; its version counts up, so that autograd notices.
    """
    tensor.set_(value.to(tensor.device, tensor.dtype))  # type: ignore[call-overload]


def records_in(model: nn.Module) -> list[tuple[str, nn.Module, Record]]:
    """(path, module, record) of every record in the model, the newest first."""
    found = [
        (path, module, module.__dict__[_RECORD])
        for path, module in model.named_modules()
        if _RECORD in module.__dict__
    ]
    return sorted(found, key=lambda item: -item[2].created)


def gather(model: nn.Module, changes: Before) -> Record:
    """One record of everything that was done to the model, these changes being the last."""
    records = records_in(model)
    record = Record(before=changes, bias=records[0][2].bias if records else "none")
    for path, _, older in records:
        record.adopt(older, path)
    return record


def former_flags(model: nn.Module) -> dict[nn.Module, dict[str, bool]]:
    """``requires_grad`` of every parameter, by owner and name, before any call changed it."""
    now = Before()
    now.keep_flags(model.modules())
    return gather(model, now).before.requires_grad


def install(module: nn.Module, record: Record) -> None:
    """Put the record on the module, in place of those of its submodules, which it has adopted."""
    reinstall(module, [("", module, record)])


def reinstall(model: nn.Module, records: list[tuple[str, nn.Module, Record]]) -> None:
    """Make these the records in the model again."""
    for _, holder, _ in records_in(model):
        uninstall(holder)
    for _, holder, record in records:
        holder.__dict__[_RECORD] = record


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    """Set ``requires_grad``, and drop the gradient of what is frozen.

    A stale gradient costs memory, and an optimizer would go on updating the parameter by it.
    """
    for parameter in parameters:
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None


def uninstall(module: nn.Module) -> None:
    """Take the record off the module."""
    del module.__dict__[_RECORD]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every adapted layer of the model by its path in it, awake or not, whoever adapted it."""
    return {path: module for path, module in model.named_modules() if adapters_of(module)}


def require_own_record(model: nn.Module) -> None:
    """Refuse a part of a model that was adapted as a whole: the way back is kept by the whole.

    Raises:
        LoRAInjectError: the model has adapted layers of which none of its records knows.
    """
    known = {layer for _, _, record in records_in(model) for layer, _ in record.adapters.values()}
    for path, layer in adapted_layers(model).items():
        if layer not in known:
            raise LoRAInjectError(
                "it was adapted as part of a larger model.",
                path=path,
                remedy="Call this on the model that inject was called on.",
            )


def require_awake(model: nn.Module) -> None:
    """Refuse a model whose adapters are merged or disabled.

    Raises:
        LoRAInjectError: they are.
    """
    for path, layer in adapted_layers(model).items():
        if is_asleep(layer):
            state = "merged" if merged_weights(layer) else "disabled"
            remedy = "Call unmerge first." if state == "merged" else "Leave the with block first."
            raise LoRAInjectError(f"its adapter is {state} now.", path=path, remedy=remedy)


def adapter_parameters(
    layers: Iterable[nn.Module],
) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """(all A, all B) of these layers, known from their adapters and not by name."""
    A, B = set(), set()
    for layer in layers:
        for adapter in adapters_of(layer):
            for _, A_name, B_name in adapter.pairs:
                A.add(layer.get_parameter(A_name))
                B.add(layer.get_parameter(B_name))
    return A, B


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of the module itself, or None."""
    for owned in (module._parameters, module._buffers):
        if name in owned:  # and no .get: scripted modules have other mappings
            return owned[name]
    return None
