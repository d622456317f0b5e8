"""Words of other libraries, and what they are here: for messages alone."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter
from typing import Any

from lora_inject.compat.marks import config_of_peft
from lora_inject.errors import ArgumentError

_HERE = {
    "target_modules": "targets",
    "target_parameters": "targets",
    "target": "targets",
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "modules_to_save": "train_also",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "adapter_name": "adapter",
    "init_lora_weights": "init",
    "use_rslora": 'scaling="rslora"',
    "use_dora": 'variant="dora"',
    "rank_pattern": 'targets={"q_proj": {"r": 8}}',
    "alpha_pattern": 'targets={"q_proj": {"alpha": 16}}',
    "trainable_token_indices": "rows",
    "peft_config": "targets, r and alpha",
    "lora_config": "targets, r and alpha",
    "config": "targets, r and alpha",
}
_OF_THE_OPTIMIZER = "The optimizer has it: torch.optim.AdamW(lora_parameters(model), lr=2e-4)."
_ELSEWHERE = {
    "lr": _OF_THE_OPTIMIZER,
    "learning_rate": _OF_THE_OPTIMIZER,
    "task_type": "Leave it out: the model stays of its class.",
    "inference_mode": "load(model, path, trainable=False) has it.",
}


def require_arguments(
    values: Sequence[Any], names: Iterable[str], known: Mapping[str, Parameter]
) -> None:
    """Refuse arguments that there are not, and say what they are called here.

    Args:
        values: those that are given without a name.
        names: of the others.
        known: what the function takes.

    Raises:
        ArgumentError: there is such, or too many have no name.
    """
    nameless = [name for name, own in known.items() if own.kind is own.POSITIONAL_OR_KEYWORD]
    if extra := values[len(nameless) :]:
        raise ArgumentError(
            f"only {' and '.join(nameless)} can be given without a name, not {extra[0]!r}.",
            remedy="Say what it is, as in r=8.",
        )
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1) if len(name) > 2 else []
            meant = _HERE.get(name) or (close[0] if close else "")
            there = f"Here it is {meant}." if meant else f"There are {', '.join(known)}."
            raise ArgumentError(
                f"there is no argument {name!r}.", remedy=_ELSEWHERE.get(name, there)
            )


def require_no_config(targets: Any) -> None:
    """Refuse a config of PEFT in the place of targets, and say it in arguments.

    Raises:
        ArgumentError: it is one.
    """
    config = config_of_peft(targets)
    if config is not None:
        text = ", ".join(f"{name}={value!r}" for name, value in config.items())
        raise ArgumentError(
            f"targets is a {type(targets).__name__}, and there are no configs here.",
            remedy=f"Say what is in it: {text}.",
        )
