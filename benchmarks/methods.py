"""The methods whose quality is compared: how each adapts MiniLM, and PEFT's word for it."""

import copy
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn

from lora_inject import LoRALayer, allocate, calibrate, freeze, inject
from lora_inject.cli import demo
from lora_inject.starts import EVA

RANKS = (1, 4, 16)
HEAD = ["head"]
CALIBRATION = 20  # batches
Adapt = Callable[[nn.Module, demo.Words], object]


def _lora(**arguments: Any) -> Adapt:
    return lambda model, words: inject(model, demo.TARGETS, train_also=HEAD, **arguments)


def _eva(model: nn.Module, words: demo.Words) -> object:
    """Directions of the inputs, and ranks by how much they vary there; four on average."""
    found = demo.batches(words, torch.Generator().manual_seed(0))
    seen = [(batch,) for batch in islice(found, CALIBRATION)]
    stats = calibrate(model, demo.TARGETS, seen, mask=lambda b: b[0].mask, progress=False)
    return inject(model, allocate(stats, r=4), init=EVA(stats), train_also=HEAD)


ADAPT: dict[str, Adapt] = {
    "head only": lambda model, words: freeze(model, train_also=HEAD),
    **{f"LoRA r={r}": _lora(r=r) for r in RANKS},
    "rsLoRA r=16": _lora(r=16, scaling="rslora"),
    "LoRA-FA r=4": _lora(r=4, fixed="A"),
    "DoRA r=4": _lora(r=4, variant="dora"),
    "PiSSA r=4": _lora(r=4, init="pissa"),
    "EVA r=4 on average": _eva,
    "full fine-tuning": lambda model, words: None,
}
# PEFT's configs for the methods whose losses have to be PEFT's: EVA starts from other directions
# there, and its LoRA-FA is an optimizer.
IN_PEFT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({}, {}),
    "rsLoRA": ({"scaling": "rslora"}, {"use_rslora": True}),
    "DoRA": ({"variant": "dora"}, {"use_dora": True}),
    "PiSSA": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "OLoRA": ({"init": "olora"}, {"init_lora_weights": "olora"}),
}


def twins(model: nn.Module, name: str, r: int, alpha: int) -> tuple[nn.Module, nn.Module]:
    """The model with our adapters, and a copy of it with PEFT's of the same values; no dropout."""
    import peft

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours, theirs = IN_PEFT[name]
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=demo.TARGETS, modules_to_save=HEAD, **theirs
    )
    other = peft.get_peft_model(copy.deepcopy(model), config)
    inject(model, demo.TARGETS, r=r, alpha=alpha, train_also=HEAD, **ours)
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, LoRALayer):
                wrapped = other.get_submodule(f"base_model.model.{path}")
                wrapped.lora_A["default"].weight.copy_(layer.lora_A)
                wrapped.lora_B["default"].weight.copy_(layer.lora_B)
    return model, other
