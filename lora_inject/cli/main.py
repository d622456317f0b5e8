"""The command line: ``lora-inject plan``, ``inspect``, ``convert`` and ``demo``."""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from lora_inject.capacity.capacity import capacity
from lora_inject.core.request import ALL_LINEAR
from lora_inject.errors import ArgumentError, LoRAInjectError
from lora_inject.files.convert import convert, inspect
from lora_inject.files.formats import FORMATS
from lora_inject.inject import inject
from lora_inject.plan import plan
from lora_inject.report.bytes import OPTIMIZER_STATES
from lora_inject.report.report import report

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_BROKEN_PIPE = 128 + 13  # SIGPIPE, which is no name of Windows
_CAPACITY = ("seq", "batch", "fsdp", "tp", "checkpointing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors are one line on standard error and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        print("lora-inject: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (LoRAInjectError, OSError) as error:
        print(f"lora-inject: error: {' '.join(str(error).split())[:1000]}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """One line for an error, as everywhere; ``--help`` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lora-inject", description="LoRA as surgery: adapt any PyTorch model in place."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_files(commands)
    _add_demo(commands)
    return parser


def _add_plan(commands: Any) -> None:
    show = commands.add_parser(
        "plan",
        help="show what would be adapted, what would train and what memory that takes",
        description="Show what inject would do to a model, without its weights.",
    )
    show.set_defaults(run=_plan)
    show.add_argument(
        "model",
        metavar="MODEL",
        help="a directory or JSON file with a transformers config (built on the meta device), or "
        "package.module:callable, a function without arguments that returns an nn.Module",
    )
    show.add_argument(
        "--targets", nargs="+", default=[ALL_LINEAR], metavar="PATTERN",
        help="names, globs or re:... of layers; default: all-linear",
    )  # fmt: skip
    show.add_argument("-r", "--rank", type=int, default=8, metavar="R")
    show.add_argument("--alpha", type=float, default=None, help="default: the rank")
    show.add_argument("--dropout", type=float, default=0.0)
    show.add_argument("--bias", default="none", help="none, all or lora_only")
    show.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="what is left alone"
    )
    show.add_argument(
        "--layers", nargs="+", type=int, default=None, metavar="INDEX", help="blocks; default: all"
    )
    show.add_argument(
        "--train-also", nargs="+", default=[], metavar="PATTERN", help="modules that train in full"
    )
    show.add_argument("--optimizer", default="adamw", help=", ".join(OPTIMIZER_STATES))
    show.add_argument("--dtype", choices=list(_DTYPES), help="of the base; default: the config's")
    show.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_capacity(show)


def _add_capacity(show: argparse.ArgumentParser) -> None:
    paper = show.add_argument_group(
        "capacity", "Any of these also shows what each device would hold, and how many it takes."
    )
    paper.add_argument("--seq", type=int, metavar="TOKENS", help="in a row; not for images")
    paper.add_argument("--batch", type=int, metavar="ROWS", help="on each FSDP rank; default 1")
    paper.add_argument("--fsdp", type=int, metavar="RANKS", help="fully_shard; default 1")
    paper.add_argument("--tp", type=int, metavar="RANKS", help="tensor parallel; default 1")
    paper.add_argument(
        "--checkpointing", action="store_const", const=True, help="compute blocks again"
    )


def _add_files(commands: Any) -> None:
    look = commands.add_parser(
        "inspect",
        help="show what is in an adapter file",
        description="Show config, ranks, dtypes, norms and sizes of an adapter file.",
    )
    look.set_defaults(run=_inspect)
    look.add_argument("path", metavar="PATH", type=Path, help="a file or directory")
    look.add_argument("--json", action="store_true", help="print it as JSON")
    change = commands.add_parser(
        "convert",
        help="write an adapter file in another format",
        description="Write an adapter file in another format, with the same values.",
    )
    change.set_defaults(run=_convert)
    change.add_argument("source", metavar="SRC", type=Path)
    change.add_argument("target", metavar="DST", type=Path)
    change.add_argument("--to", required=True, choices=list(FORMATS))
    change.add_argument("--alpha", type=float, help="for files that do not say it (loralib)")
    change.add_argument("--portable", action="store_true", help="one rank, scalings folded into B")
    for command in (look, change):
        command.add_argument("--format", choices=list(FORMATS), help="default: found out")
        command.add_argument("--model", help="what it is for, as in plan; kohya's names need it")


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="fine-tune a pretrained model on rated words, then strip it",
        description="Fine-tune the packaged MiniLM on the packaged VADER lexicon (offline).",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--epochs", type=int, default=2)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG of loss and scatter")


def _plan(options: argparse.Namespace) -> None:
    model = load_model(options.model)
    if options.dtype:
        model.to(_DTYPES[options.dtype])
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
    shown = plan(model, **arguments)
    inject(model, **arguments)
    counted = report(model, options.optimizer)
    wanted = {n: v for n in _CAPACITY if (v := getattr(options, n)) is not None}
    needed = capacity(model, optimizer=options.optimizer, **wanted) if wanted else None
    if options.json:
        more = {"capacity": needed.to_dict()} if needed else {}
        print(json.dumps({**counted.to_dict(), **more}, indent=2))
    else:
        print("\n\n".join(str(part) for part in (shown, counted, needed) if part))


def _inspect(options: argparse.Namespace) -> None:
    model = load_model(options.model) if options.model else None
    shown = inspect(options.path, format=options.format, model=model)
    print(json.dumps(shown.to_dict(), indent=2) if options.json else shown)


def _convert(options: argparse.Namespace) -> None:
    model = load_model(options.model) if options.model else None
    convert(
        options.source, options.target, options.to, format=options.format, model=model,
        alpha=options.alpha, portable=options.portable,
    )  # fmt: skip
    print(inspect(options.target, model=model))


def _demo(options: argparse.Namespace) -> None:
    from lora_inject.cli.demo import run

    run(epochs=options.epochs, seed=options.seed, plot=options.plot)


def load_model(source: str) -> nn.Module:
    """Build the model that the command line names.

    Args:
        source: a directory with ``config.json``, a config file, or ``package.module:callable``.

    Raises:
        ArgumentError: there is no such file, module or function, or it makes no model.
    """
    path = Path(source)
    if source and path.exists():
        return _from_config(path)
    module_name, colon, attribute = source.partition(":")
    if not colon or not module_name or not attribute or module_name.startswith("."):
        raise ArgumentError(
            f"MODEL: there is no file or directory {source!r}.",
            remedy="Give a config's path or package.module:callable.",
        )
    sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(module_name), attribute)
        model = build() if callable(build) else build
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {error}"
        raise ArgumentError(f"MODEL: {source!r} cannot be built: {reason}.") from error
    finally:
        sys.path.remove("")
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
                return _checked(named._from_config(config))  # type: ignore[no-untyped-call]
            return _checked(transformers.AutoModel.from_config(config))  # type: ignore[no-untyped-call]
    except Exception as error:  # a config can be wrong in as many ways as there are models
        reason = f"{type(error).__name__}: {error}"
        raise ArgumentError(f"MODEL: {str(path)!r} is no usable config: {reason}") from error


def _checked(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model
