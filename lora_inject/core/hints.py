"""Words of other libraries, and what they are here: for messages alone."""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
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


def require_arguments(given: Iterable[str], known: Collection[str]) -> None:
    """Refuse keyword arguments that there are not, and say what they are called here.

    Raises:
        ArgumentError: there is such.
    """
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            meant = _HERE.get(name) or (close[0] if close else "")
            raise ArgumentError(
                f"there is no argument {name!r}.",
                remedy=f"Here it is {meant}." if meant else f"There are {', '.join(known)}.",
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
