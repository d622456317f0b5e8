"""What a model was before it was adapted, and the way back: the only code that restores.

A ``Record`` is one private attribute of the module that ``inject`` was called on. It refers to
modules by object and to parameters by their owner and name, so it follows deep copies, pickling,
``.to()`` and wrappers, which rename paths or replace parameters but keep modules.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_inject.errors import LoRAInjectError
from lora_inject.layer import LoRALayer, detach, is_intact
from lora_inject.settings import BiasMode

_RECORD = "_lora_inject_record"


@dataclass
class Before:
    """What modules were before one call changed them: its undo, and its share of the record."""

    training: dict[nn.Module, bool] = field(default_factory=dict)
    requires_grad: dict[nn.Module, dict[str, bool]] = field(default_factory=dict)
    values: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)
    attributes: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    hooks: dict[nn.Module, list[RemovableHandle]] = field(default_factory=dict)

    def keep_flags(self, modules: Iterable[nn.Module]) -> None:
        """Keep the ``training`` flag of each module and ``requires_grad`` of its parameters."""
        for module in modules:
            self.training[module] = module.training
            self.requires_grad[module] = {
                name: p.requires_grad for name, p in module._parameters.items() if p is not None
            }

    def keep_value(self, module: nn.Module, name: str) -> None:
        """Keep a copy, in CPU memory, of a parameter or buffer that is going to change.

        On the meta device there is no value yet; ``reset_lora_parameters`` asks again.
        """
        tensor = _own_tensor(module, name)
        kept = self.values.setdefault(module, {})
        if tensor is not None and (name not in kept or kept[name].is_meta):
            device = "meta" if tensor.is_meta else "cpu"
            kept[name] = tensor.detach().to(device, copy=True)

    def change_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute and keep the former one."""
        self.attributes.setdefault(module, {}).setdefault(name, getattr(module, name))
        setattr(module, name, value)

    def keep_hook(self, module: nn.Module, handle: RemovableHandle) -> None:
        """Keep the handle of a hook that was put on the module."""
        self.hooks.setdefault(module, []).append(handle)

    def release(self, module: nn.Module) -> None:
        """Put the module's attributes back and take its hooks off."""
        for name, former in self.attributes.pop(module, {}).items():
            setattr(module, name, former)
        for handle in self.hooks.pop(module, []):
            handle.remove()

    def unknown_values(self) -> Iterator[tuple[nn.Module, str]]:
        """Tensors that have a value now and had none (meta device) when it was to be kept."""
        for module, kept in self.values.items():
            for name, value in kept.items():
                tensor = _own_tensor(module, name)
                if value.is_meta and tensor is not None and not tensor.is_meta:
                    yield module, name

    def restore(self) -> None:
        """Put everything back; parameters keep their identity, values are cast to their dtype."""
        for module, training in self.training.items():
            module.training = training
        for module, flags in self.requires_grad.items():
            for name, flag in flags.items():
                parameter = module._parameters.get(name)
                if parameter is not None:
                    parameter.requires_grad_(flag)
        with torch.no_grad():
            for module, kept in self.values.items():
                for name, value in kept.items():
                    tensor = _own_tensor(module, name)
                    if tensor is not None and not value.is_meta:
                        tensor.copy_(value)
                        tensor.grad = None
        for module in [*self.attributes, *self.hooks]:
            self.release(module)

    def precede(self, older: "Before") -> None:
        """Take over what an earlier call kept; where both know a thing, the earlier is right."""
        self.training |= older.training
        for mine, theirs in (
            (self.requires_grad, older.requires_grad),
            (self.values, older.values),
            (self.attributes, older.attributes),
        ):
            for module, kept in theirs.items():
                mine[module] = {**mine.get(module, {}), **kept}  # type: ignore[dict-item]
        for module, handles in older.hooks.items():
            self.hooks[module] = handles + self.hooks.get(module, [])


@dataclass
class Record:
    """Everything ``inject`` did to a model.

    Attributes:
        layers: the adapted layers by path.
        before: what the model was.
        bias: the bias mode in force.
        train_also: the modules that train in full, as they were selected.
        created: when, so that records of nested modules are undone in the right order.
    """

    layers: dict[str, LoRALayer] = field(default_factory=dict)
    before: Before = field(default_factory=Before)
    bias: BiasMode = "none"
    train_also: list[nn.Module] = field(default_factory=list)
    created: int = field(default_factory=time.time_ns)

    def adopt(self, older: "Record", path: str) -> None:
        """Take over an earlier record, of the same module or of a submodule at the path."""
        prefix = f"{path}." if path else ""
        self.layers |= {prefix + name: layer for name, layer in older.layers.items()}
        self.before.precede(older.before)
        self.train_also += older.train_also

    def check_restorable(self) -> None:
        """Refuse before anything is changed.

        Raises:
            LoRAInjectError: something else has changed a layer's class since, or a former value is
                not known.
        """
        for path, layer in self.layers.items():
            if not is_intact(layer):
                raise LoRAInjectError(
                    f"its class is now {type(layer).__name__}, put there after inject.",
                    path=path,
                    remedy="Undo that first, or strip before it is done.",
                )
        for module, name in self.before.unknown_values():
            raise LoRAInjectError(
                f"the former value of {name} of a {type(module).__name__} is not known: the model "
                "was on the meta device when inject was called.",
                remedy="Load the base weights, then call reset_lora_parameters, then train.",
            )

    def restore(self) -> None:
        """Make the model what it was."""
        for layer in self.layers.values():
            detach(layer)
        self.before.restore()


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


def install(module: nn.Module, record: Record) -> None:
    """Put the record on the module, in place of those of its submodules, which it has adopted."""
    for _, holder, _ in records_in(module):
        uninstall(holder)
    module.__dict__[_RECORD] = record


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


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Every adapted layer of the model by its path in it, whoever adapted it."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALayer)}


def require_own_record(model: nn.Module) -> None:
    """Refuse a part of a model that was adapted as a whole: the way back is kept by the whole.

    Raises:
        LoRAInjectError: the model has adapted layers of which none of its records knows.
    """
    known = {layer for _, _, record in records_in(model) for layer in record.layers.values()}
    for path, layer in adapted_layers(model).items():
        if layer not in known:
            raise LoRAInjectError(
                "it was adapted as part of a larger model.",
                path=path,
                remedy="Call this on the model that inject was called on.",
            )


def adapter_parameters(
    layers: Iterable[LoRALayer],
) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """(all A, all B) of these layers, known from their adapters and not by name."""
    A, B = set(), set()
    for layer in layers:
        for adapter in layer.adapters.values():
            A.add(layer.get_parameter(adapter.A_name))
            B.add(layer.get_parameter(adapter.B_name))
    return A, B


def _own_tensor(module: nn.Module, name: str) -> Tensor | None:
    parameter = module._parameters.get(name)
    return parameter if parameter is not None else module._buffers.get(name)
