"""The methods whose quality is compared: how each adapts MiniLM, ours and PEFT's."""

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
PEFT = ", PEFT"  # the end of the names of its methods
CALIBRATION = 20  # batches
R = 4  # of what is compared with PEFT, but for rsLoRA, which is for large ranks
Adapt = Callable[[nn.Module, demo.Words], Any]


def _lora(**arguments: Any) -> Adapt:
    return lambda model, words: inject(model, demo.TARGETS, train_also=HEAD, **arguments)


def _eva(model: nn.Module, words: demo.Words) -> object:
    """Directions of the inputs, and ranks by how much they vary there; four on average."""
    seen = [(batch,) for batch in _calibration(words)]
    stats = calibrate(model, demo.TARGETS, seen, mask=lambda b: b[0].mask, progress=False)
    return inject(model, allocate(stats, r=R), init=EVA(stats), train_also=HEAD)


def _calibration(words: demo.Words) -> list[demo.Words]:
    found = demo.batches(words, torch.Generator().manual_seed(0))
    return list(islice(found, CALIBRATION))


def _peft(r: int = R, **arguments: Any) -> Adapt:
    """PEFT's adapters in the model itself; returns the model around it that PEFT wants."""
    return lambda model, words: _wrapped(model, r, r, **arguments)


def _wrapped(model: nn.Module, r: int, alpha: int, **arguments: Any) -> Any:
    import peft

    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=demo.TARGETS, modules_to_save=HEAD, **arguments
    )
    return peft.get_peft_model(model, config)


def _eva_of_peft(model: nn.Module, words: demo.Words) -> Any:
    """The same calibration by PEFT's hooks, and its own ranks."""
    import peft

    wrapped = _wrapped(model, R, R, init_lora_weights="eva", eva_config=peft.EvaConfig())
    peft.initialize_lora_eva_weights(
        wrapped,
        [vars(batch) for batch in _calibration(words)],
        forward_fn=lambda model, batch: model(demo.Words(**batch)),
        prepare_model_inputs_fn=lambda batch, config: batch["mask"].bool(),
        prepare_layer_inputs_fn=lambda x, mask, name: x[0][mask],
        show_progress_bar=False,
    )
    return wrapped


def optimizer_of(name: str, adapted: Any, rate: float) -> torch.optim.Optimizer | None:
    """The optimizer that a method is one of; None where it trains with the demo's.

    Args:
        name: of the method.
        adapted: what its entry of ``ADAPT`` returned.
        rate: the learning rate.
    """
    if name != f"LoRA-FA r=4{PEFT}":
        return None
    from peft.optimizers import create_lorafa_optimizer

    made: torch.optim.Optimizer = create_lorafa_optimizer(adapted, R, R, rate)
    return made


ADAPT: dict[str, Adapt] = {
    "head only": lambda model, words: freeze(model, train_also=HEAD),
    **{f"LoRA r={r}": _lora(r=r) for r in RANKS},
    f"LoRA r=4{PEFT}": _peft(),
    "rsLoRA r=16": _lora(r=16, scaling="rslora"),
    f"rsLoRA r=16{PEFT}": _peft(r=16, use_rslora=True),
    "DoRA r=4": _lora(r=R, variant="dora"),
    f"DoRA r=4{PEFT}": _peft(use_dora=True),
    "PiSSA r=4": _lora(r=R, init="pissa"),
    f"PiSSA r=4{PEFT}": _peft(init_lora_weights="pissa"),
    "EVA r=4 on average": _eva,
    f"EVA r=4 on average{PEFT}": _eva_of_peft,
    "LoRA-FA r=4": _lora(r=R, fixed="A"),
    f"LoRA-FA r=4{PEFT}": _peft(),
    "full fine-tuning": lambda model, words: None,
}
# PEFT's configs for the methods whose losses have to be PEFT's: EVA starts from other directions
# there, and its LoRA-FA is an optimizer (``optimizer_of``).
IN_PEFT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({}, {}),
    "rsLoRA": ({"scaling": "rslora"}, {"use_rslora": True}),
    "DoRA": ({"variant": "dora"}, {"use_dora": True}),
    "PiSSA": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "OLoRA": ({"init": "olora"}, {"init_lora_weights": "olora"}),
}


def twins(model: nn.Module, name: str, r: int, alpha: int) -> tuple[nn.Module, nn.Module]:
    """The model with our adapters, and a copy of it with PEFT's of the same values; no dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours, theirs = IN_PEFT[name]
    other: nn.Module = _wrapped(copy.deepcopy(model), r, alpha, **theirs)
    inject(model, demo.TARGETS, r=r, alpha=alpha, train_also=HEAD, **ours)
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, LoRALayer):
                wrapped = other.get_submodule(f"base_model.model.{path}")
                wrapped.lora_A["default"].weight.copy_(layer.lora_A)
                wrapped.lora_B["default"].weight.copy_(layer.lora_B)
    return model, other
