"""What the commands do. Importing this imports torch, which the command line alone does not."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_inject.audit.audit import audit as audit_of
from lora_inject.capacity.capacity import capacity
from lora_inject.errors import ArgumentError
from lora_inject.files.convert import convert as convert_file
from lora_inject.files.convert import inspect as inspect_file
from lora_inject.files.formats.peft_config import CONFIG as ADAPTER_CONFIG
from lora_inject.inject import inject as adapt
from lora_inject.plan import plan as plan_of
from lora_inject.printing import show
from lora_inject.printing.progress import doing
from lora_inject.report.report import report
from lora_inject.settings import check_dtype

_CAPACITY = ("seq", "batch", "fsdp", "tp", "checkpointing")


def plan(options: argparse.Namespace) -> None:
    """``lora-inject plan``: what inject would do, what would train, and what memory that takes."""
    with doing(f"building {options.model} without its weights"):
        model = load_model(options.model)
    if options.dtype:
        model.to(check_dtype(options.dtype))
    arguments: dict[str, Any] = {
        "targets": options.targets,
        "r": options.rank,
        "alpha": options.alpha,
        "dropout": options.dropout,
        "bias": options.bias,
        "exclude": options.exclude,
        "layers": options.layers,
        "train_also": options.train_also,
    }
    with doing("choosing and adapting layers"):
        shown = plan_of(model, **arguments)
        adapt(model, **arguments)
        counted = report(model, options.optimizer)
    needed, wanted = None, {n: v for n in _CAPACITY if (v := getattr(options, n)) is not None}
    if wanted:
        with doing("running its forward on the meta device"):
            needed = capacity(model, optimizer=options.optimizer, **wanted)
    if options.json:
        more = {"capacity": needed.to_dict()} if needed else {}
        print(json.dumps({**counted.to_dict(), **more}, indent=2))
    else:
        show(*(part for part in (shown, counted, needed) if part))


def audit(options: argparse.Namespace) -> int:
    """``lora-inject audit``: whether an adapted model really trains."""
    with doing(f"building {options.model}"):
        built = _built(options.model)
    parts = built if isinstance(built, tuple) else (built,)
    model, batch, optimizer = (*parts, None, None)[:3]
    with doing("running it once"):
        found = audit_of(_checked(model, options.model), batch, optimizer=optimizer)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)
    return int(found.failed)


def inspect(options: argparse.Namespace) -> None:
    """``lora-inject inspect``: what is in an adapter file."""
    model = load_model(options.model) if options.model else None
    found = inspect_file(options.path, format=options.format, model=model)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)


def convert(options: argparse.Namespace) -> None:
    """``lora-inject convert``: an adapter file in another format."""
    model = load_model(options.model) if options.model else None
    convert_file(
        options.source, options.target, options.to, format=options.format, model=model,
        alpha=options.alpha, portable=options.portable,
    )  # fmt: skip
    written = options.source if options.to == "gguf" else options.target  # which is not read
    show(inspect_file(written, model=model))


def demo(options: argparse.Namespace) -> None:
    """``lora-inject demo``: the main job on real input."""
    from lora_inject.cli.demo import run

    if "OMP_NUM_THREADS" not in os.environ:
        # Batches of a few short words keep one core busy. A second thread gains little, and where
        # others are at work each product waits for it: one such run took seven times the CPU time.
        torch.set_num_threads(1)
    run(epochs=options.epochs, seed=options.seed, plot=options.plot)


def load_model(source: str) -> nn.Module:
    """Build the model that the command line names.

    Args:
        source: a directory with ``config.json``, a config file, or ``package.module:callable``.

    Raises:
        ArgumentError: there is no such file, module or function, or it makes no model.
    """
    path = Path(source)
    if (path / ADAPTER_CONFIG).exists() and not (path / "config.json").exists():
        raise ArgumentError(
            f"MODEL: {source!r} holds an adapter, and not the config of a model.",
            remedy="Give the base model's directory; lora-inject inspect shows an adapter.",
        )
    if source and path.exists():
        return _from_config(path)
    if not _names_a_function(source):
        raise ArgumentError(
            f"MODEL: there is no file or directory {source!r}.",
            remedy="Give a config's path or package.module:callable.",
        )
    return _checked(_built(source), source)


def _names_a_function(source: str) -> bool:
    module_name, _, attribute = source.partition(":")
    return bool(module_name and attribute) and not module_name.startswith(".")


def _built(source: str) -> Any:
    """What the user's function returns, or what stands there."""
    if not _names_a_function(source):
        raise ArgumentError(
            f"MODEL: {source!r} is no package.module:callable.",
            remedy="Give a function that builds the model, so that it can run with its weights.",
        )
    module_name, _, attribute = source.partition(":")
    sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
        return build() if callable(build) and not isinstance(build, nn.Module) else build
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {error}"
        raise ArgumentError(f"MODEL: {source!r} cannot be built: {reason}.") from error
    finally:
        sys.path.remove("")


def _checked(model: Any, source: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"MODEL: {source!r} gives a {type(model).__name__}, not an nn.Module.")
    return model


def _from_config(path: Path) -> nn.Module:
    """The model of a transformers config on the meta device, where weights take no memory."""
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(
            "MODEL: reading a config needs transformers.",
            remedy="Install it: pip install transformers.",
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        named = getattr(transformers, str((config.architectures or [""])[0]), None)
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return _checked(named._from_config(config), str(path))  # type: ignore[no-untyped-call]
            return _checked(transformers.AutoModel.from_config(config), str(path))  # type: ignore[no-untyped-call]
    except Exception as error:  # a config can be wrong in as many ways as there are models
        reason = f"{type(error).__name__}: {error}"
        raise ArgumentError(f"MODEL: {str(path)!r} is no usable config: {reason}") from error
