"""LoRA as surgery: adapt any PyTorch model in place with one line, and undo it bit for bit.

from lora_inject import inject, strip

print(inject(model, targets=["q_proj", "v_proj"], r=4))
strip(model)

A public name is imported where it is first asked for, so that ``import lora_inject`` costs nothing
and a program that only injects never reads what saves, calibrates or plans.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_inject.adapters.combine import CombineReport, combine
    from lora_inject.adapters.disabled import disabled
    from lora_inject.adapters.extract import ExtractReport, extract
    from lora_inject.adapters.per_row import per_row
    from lora_inject.adapters.use import remove, use
    from lora_inject.audit.audit import audit
    from lora_inject.audit.findings import Audit, Finding
    from lora_inject.audit.monitor import Monitor, monitor
    from lora_inject.calibration.allocate import allocate
    from lora_inject.calibration.calibrate import calibrate
    from lora_inject.calibration.statistics import Statistics
    from lora_inject.capacity.capacity import Capacity, capacity
    from lora_inject.core.layer import LoRALayer
    from lora_inject.errors import (
        AlreadyAdaptedError,
        ArgumentError,
        FormatError,
        LoRAInjectError,
        LoRAInjectWarning,
        NoMatchError,
        UnsupportedLayerError,
    )
    from lora_inject.files.convert import convert, inspect
    from lora_inject.files.pipeline import load_pipeline, save_pipeline
    from lora_inject.files.save_load import load, save
    from lora_inject.files.state_dict import load_lora_state_dict, lora_state_dict
    from lora_inject.inject import inject, strip
    from lora_inject.kinds import Kind, Spec, register_kind
    from lora_inject.merging.folding import MergeReport
    from lora_inject.merging.merge import merge, merged, unmerge
    from lora_inject.plan import Plan, plan
    from lora_inject.report.report import Report, report
    from lora_inject.training.checkpointing import reentrant_checkpointing
    from lora_inject.training.clip import clip_norms
    from lora_inject.training.freeze import freeze, mark_only_lora_as_trainable
    from lora_inject.training.optimizer import lora_parameters, param_groups
    from lora_inject.training.reset import reset_lora_parameters

__all__ = [
    "AlreadyAdaptedError",
    "ArgumentError",
    "Audit",
    "Capacity",
    "CombineReport",
    "ExtractReport",
    "Finding",
    "FormatError",
    "Kind",
    "LoRAInjectError",
    "LoRAInjectWarning",
    "LoRALayer",
    "MergeReport",
    "Monitor",
    "NoMatchError",
    "Plan",
    "Report",
    "Spec",
    "Statistics",
    "UnsupportedLayerError",
    "allocate",
    "audit",
    "calibrate",
    "capacity",
    "clip_norms",
    "combine",
    "convert",
    "disabled",
    "extract",
    "freeze",
    "inject",
    "inspect",
    "load",
    "load_lora_state_dict",
    "load_pipeline",
    "lora_parameters",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merged",
    "monitor",
    "param_groups",
    "per_row",
    "plan",
    "reentrant_checkpointing",
    "register_kind",
    "remove",
    "report",
    "reset_lora_parameters",
    "save",
    "save_pipeline",
    "strip",
    "unmerge",
    "use",
]
__version__ = "0.1.0"

_HOMES = {
    "adapters.combine": ["CombineReport", "combine"],
    "adapters.disabled": ["disabled"],
    "adapters.extract": ["ExtractReport", "extract"],
    "adapters.per_row": ["per_row"],
    "adapters.use": ["remove", "use"],
    "audit.audit": ["audit"],
    "audit.findings": ["Audit", "Finding"],
    "audit.monitor": ["Monitor", "monitor"],
    "calibration.allocate": ["allocate"],
    "calibration.calibrate": ["calibrate"],
    "calibration.statistics": ["Statistics"],
    "capacity.capacity": ["Capacity", "capacity"],
    "core.layer": ["LoRALayer"],
    "errors": [
        "AlreadyAdaptedError",
        "ArgumentError",
        "FormatError",
        "LoRAInjectError",
        "LoRAInjectWarning",
        "NoMatchError",
        "UnsupportedLayerError",
    ],
    "files.convert": ["convert", "inspect"],
    "files.pipeline": ["load_pipeline", "save_pipeline"],
    "files.save_load": ["load", "save"],
    "files.state_dict": ["load_lora_state_dict", "lora_state_dict"],
    "inject": ["inject", "strip"],
    "kinds": ["Kind", "Spec", "register_kind"],
    "merging.folding": ["MergeReport"],
    "merging.merge": ["merge", "merged", "unmerge"],
    "plan": ["Plan", "plan"],
    "report.report": ["Report", "report"],
    "training.checkpointing": ["reentrant_checkpointing"],
    "training.clip": ["clip_norms"],
    "training.freeze": ["freeze", "mark_only_lora_as_trainable"],
    "training.optimizer": ["lora_parameters", "param_groups"],
    "training.reset": ["reset_lora_parameters"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The package, on which a module never stands in the place of a public name.

    Some modules have the name of a function, as ``inject.py`` has; importing one sets it here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
