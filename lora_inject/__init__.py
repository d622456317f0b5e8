"""LoRA as surgery: adapt any PyTorch model in place with one line, and undo it bit for bit.

from lora_inject import inject, strip

print(inject(model, targets=["q_proj", "v_proj"], r=4))
strip(model)
"""

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
    "disabled",
    "extract",
    "freeze",
    "inject",
    "load",
    "load_lora_state_dict",
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
    "strip",
    "unmerge",
    "use",
]
__version__ = "0.1.0"
