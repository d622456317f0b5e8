"""Small models of timm: of each of its modules the first one that is small."""

import importlib.util
import inspect
from typing import Any

import torch
from torch import nn

PREFIX = "timm: "
MOST = 12_000_000  # parameters


def family_names() -> list[str]:
    """The modules of timm, where it is installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    import timm

    return [f"{PREFIX}{module}" for module in timm.list_modules()]


def family_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of a module, with an input.

    Raises:
        ValueError: all of its models are large.
    """
    import timm

    for model_name in timm.list_models(module=name.removeprefix(PREFIX)):
        with torch.device("meta"):
            try:
                size = sum(p.numel() for p in timm.create_model(model_name).parameters())
            except Exception:
                continue  # it computes with values when it is made
        if size <= MOST:
            torch.manual_seed(0)
            model: Any = timm.create_model(model_name).eval()
            argument = next(iter(inspect.signature(model.forward).parameters))
            return model, {argument: torch.randn(2, *model.default_cfg["input_size"])}
    raise ValueError("its small config has too many parameters")
