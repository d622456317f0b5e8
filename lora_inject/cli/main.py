"""The command line: ``plan``, ``audit``, ``inspect``, ``convert`` and ``demo``, and its options.

What the commands do is in ``commands.py``, which is imported when one runs: ``--help`` and mistakes
in the options are answered without torch.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, NoReturn

import lora_inject
from lora_inject.errors import LoRAInjectError
from lora_inject.printing.progress import doing

DTYPES = ("bf16", "fp16", "fp32")
FORMATS = ("peft", "loralib", "kohya", "diffusers", "gguf")
OPTIMIZERS = (
    "adamw", "adam", "nadam", "radam", "adamax", "rmsprop", "adagrad", "sgd-momentum", "sgd",
)  # fmt: skip
_BROKEN_PIPE = 128 + 13  # SIGPIPE, which is no name of Windows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors are one line on standard error and exit code 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    try:
        code: int = options.run(options)
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
    return code


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """The command of this name, which is imported when it runs, and returns the exit code."""

    def run(options: argparse.Namespace) -> int:
        with doing("importing torch"):
            commands = import_module("lora_inject.cli.commands")
        return getattr(commands, name)(options) or 0

    return run


def _versions() -> str:
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    return f"lora_inject {lora_inject.__version__} (torch {torch}, Python {python_version()})"


class _Parser(argparse.ArgumentParser):
    """One line for an error, as everywhere; ``--help`` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lora-inject", description="LoRA as surgery: adapt any PyTorch model in place."
    )
    parser.add_argument("--version", action="version", version=_versions())
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_plan(commands)
    _add_audit(commands)
    _add_files(commands)
    _add_demo(commands)
    return parser


def _add_plan(commands: Any) -> None:
    show = commands.add_parser(
        "plan",
        help="show what would be adapted and train, what memory that takes, and how many devices",
        description="Show what inject would do to a model, without its weights.",
    )
    show.set_defaults(run=_command("plan"))
    show.add_argument(
        "model",
        metavar="MODEL",
        help="a directory or JSON file with a transformers config (built on the meta device), or "
        "package.module:callable, a function without arguments that returns an nn.Module",
    )
    show.add_argument(
        "--targets", nargs="+", default=["all-linear"], metavar="PATTERN",
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
    show.add_argument("--optimizer", default="adamw", help=", ".join(OPTIMIZERS))
    show.add_argument("--dtype", choices=DTYPES, help="of the base; default: the config's")
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


def _add_audit(commands: Any) -> None:
    check = commands.add_parser(
        "audit",
        help="find out whether an adapted model really trains",
        description="Run an adapted model once forward and backward and show what is wrong; the "
        "exit code is 1 where that is more than notes.",
    )
    check.set_defaults(run=_command("audit"))
    check.add_argument(
        "model",
        metavar="MODEL",
        help="package.module:callable, a function without arguments that returns an adapted "
        "nn.Module, or (model, batch), or (model, batch, optimizer)",
    )
    check.add_argument("--json", action="store_true", help="print it as JSON")


def _add_files(commands: Any) -> None:
    look = commands.add_parser(
        "inspect",
        help="show what is in an adapter file",
        description="Show config, ranks, dtypes, norms and sizes of an adapter file.",
    )
    look.set_defaults(run=_command("inspect"))
    look.add_argument("path", metavar="PATH", type=Path, help="a file or directory")
    look.add_argument("--json", action="store_true", help="print it as JSON")
    change = commands.add_parser(
        "convert",
        help="write an adapter file in another format",
        description="Write an adapter file in another format, with the same values.",
    )
    change.set_defaults(run=_command("convert"))
    change.add_argument("source", metavar="SRC", type=Path)
    change.add_argument("target", metavar="DST", type=Path)
    change.add_argument("--to", required=True, choices=FORMATS)
    change.add_argument("--alpha", type=float, help="for files that do not say it (loralib)")
    change.add_argument("--portable", action="store_true", help="one rank, scalings folded into B")
    for command in (look, change):
        command.add_argument("--format", choices=FORMATS, help="default: found out")
        command.add_argument(
            "--model", "--base", dest="model",
            help="what it is for, as in plan; the names of kohya and of gguf need it",
        )  # fmt: skip


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="fine-tune a pretrained model on rated words, then strip it",
        description="Fine-tune the packaged MiniLM on the packaged VADER lexicon (offline).",
    )
    demo.set_defaults(run=_command("demo"))
    demo.add_argument("--epochs", type=int, default=2)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG of what it learned")
