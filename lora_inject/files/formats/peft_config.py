"""PEFT's ``adapter_config.json`` as it is read: what it says, and what of that is refused."""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from lora_inject.core.expressions import Limits
from lora_inject.errors import FormatError
from lora_inject.files.fingerprint import is_fingerprint
from lora_inject.files.formats.peft_patterns import Patterns
from lora_inject.files.formats.peft_rows import ALONE
from lora_inject.files.formats.peft_targets import CHARACTERS, SECONDS, target_labels
from lora_inject.files.formats.storage import parse_json
from lora_inject.files.untouched import SAMPLES
from lora_inject.settings import BiasMode
from lora_inject.variants import FIXED

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # of adapters from before PEFT 0.7
METADATA = "lora_inject"
# Keys of the config that change nothing about what the tensors mean.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora",
    "qalora_group_size", "eva_config", "ensure_weight_tying", "merge_weights", "loftq_config",
    "corda_config", "lora_ga_config", "enable_lora", "trainable_token_indices", "token_indices",
    "init_weights", "lora_bias",
}  # fmt: skip
# Of these, what is said of other things than the tensors and the target modules, and written again.
_BESIDES = (
    "task_type", "auto_mapping", "base_model_name_or_path", "revision", "megatron_config",
    "megatron_core", "ensure_weight_tying",
)  # fmt: skip
# Starting values that leave the base as it is; all others move it, and the file does not say how.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Starting values that move it, and that can be made again from the base.
REMADE_STARTS = ("pissa", "olora")
_FIXED_BY_START = {"mica": "B"}  # of these one factor keeps its start, and the base stays


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a config that asks for what we cannot do, or that is wrong.

    Raises:
        FormatError: it does.
    """
    if config.get("peft_type") not in ("LORA", ALONE):
        what, remedy = _what_it_is(config)
        raise FormatError(f"{path}: {what}.", remedy=remedy)
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise FormatError(
                f"{path}: {key}={value!r} is not supported.",
                remedy="Let PEFT merge it (merge_and_unload); or, where it says nothing of the "
                f"tensors, remove {key} from the file.",
            )
    start = _start(config)
    known = (*_HARMLESS_STARTS, *REMADE_STARTS)
    if start not in known and not fixed_by_start(config):
        raise FormatError(
            f"{path}: init_lora_weights={start!r} moves the weights of the base.",
            remedy="Let PEFT convert it: save_pretrained(path_initial_model_for_weight_conversion="
            "...).",
        )
    _check_values(config, path)


def check_words(config: Mapping[str, Any], path: Path) -> None:
    """Refuse anything but words for keys that have them.

    Raises:
        FormatError: there is such.
    """
    for key in ("peft_type", "task_type", "base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise FormatError(f"{path}: {key} must be a word, not {config[key]!r}.")


def _check_values(config: Mapping[str, Any], path: Path) -> None:
    """Refuse values of another type than their keys have."""
    for key in ("modules_to_save", "target_parameters"):
        if not (config.get(key) is None or _is_names(config[key])):
            raise FormatError(f"{path}: {key} must be a list of names, not {config[key]!r}.")
    enabled = config.get("enable_lora")
    flags = isinstance(enabled, list) and all(isinstance(flag, bool) for flag in enabled)
    if enabled and not (flags and any(enabled)):
        raise FormatError(f"{path}: enable_lora must be a list of true and false, not {enabled!r}.")
    for key in ("use_rslora", "use_dora"):
        if not (config.get(key) is None or isinstance(config[key], bool)):
            raise FormatError(f"{path}: {key} must be true or false, not {config[key]!r}.")
    dropout, bias = config.get("lora_dropout") or 0.0, config.get("bias") or "none"
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise FormatError(f"{path}: lora_dropout must be a number in [0, 1), not {dropout!r}.")
    if bias not in get_args(BiasMode):
        raise FormatError(f"{path}: bias must be one of {get_args(BiasMode)}, not {bias!r}.")


def with_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with numbers where some tools write them as strings."""
    plain = {key: _as_number(config[key]) for key in ("r", "lora_alpha", "lora_dropout")
             if key in config}  # fmt: skip
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), dict):
            plain[key] = {name: _as_number(value) for name, value in config[key].items()}
    return {**config, **plain}


def _as_number(value: Any) -> Any:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(value, str) and number.is_integer() else number


def _start(config: Mapping[str, Any]) -> Any:
    start = config.get("init_lora_weights", True)
    return start.lower() if isinstance(start, str) else start


def fixed_by_start(config: Mapping[str, Any]) -> str:
    """The factor that does not train by the start that a config names; "" where both do."""
    start = _start(config)
    return _FIXED_BY_START[start] if isinstance(start, str) and start in _FIXED_BY_START else ""


def _what_it_is(config: Mapping[str, Any]) -> tuple[str, str]:
    """What a config is that is none of PEFT's LoRA, and what to do with it."""
    if kind := config.get("peft_type"):
        return f"it is {kind} of PEFT, and no LoRA", "Use it with PEFT."
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "it is an adapter of mlx-lm", "Use it with mlx-lm, or fuse it there (mlx_lm.fuse)."
    if str(config.get("version")).startswith("adapters"):
        return "it is an adapter of AdapterHub", "Use it with the package adapters."
    return (
        "it has no peft_type, so that it is not a PEFT config as it stands",
        'If it is one of LoRA, add "peft_type": "LORA".',
    )


def as_said(config: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a config, or what is ours beside it, says of an adapter of any type.

    Returns:
        Fields of ``AdapterData``; in ``said``, what this library does not use and saving says
        again.
    """
    return {
        "targets": tuple(own.get("targets") or target_labels(config.get("target_modules"))),
        "base": own.get("base", {}),
        "rows": own.get("rows", {}),
        "untouched": own.get("untouched", {}),
        "base_name": config.get("base_model_name_or_path") or "",
        "task": config.get("task_type") or "",
        "beside": tuple(own.get("beside", ())),
        "said": {key: config[key] for key in _BESIDES if config.get(key)},
        "dtype": own.get("dtype", ""),
    }


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1


def _map_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The test of an object of which all values pass one."""
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


# What may stand in our metadata, and the test of it; of parts, the reader of parts tells.
_OWN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("targets", "train_also", "padding", "names", "beside"), _is_names),
    **dict.fromkeys(("base", "rows"), _map_of(is_fingerprint)),
    "untouched": _map_of(lambda value: is_fingerprint(value, SAMPLES)),
    "parts": lambda value: isinstance(value, dict),
    "dropout": _map_of(_is_share),
    "drops": _map_of(lambda d: isinstance(d, list) and len(d) == 2 and all(map(_is_share, d))),
    "fixed": _map_of(lambda factor: isinstance(factor, str) and factor in FIXED),
    "start": _map_of(lambda word: isinstance(word, str)),
    "dtype": lambda value: value in ("", "base"),
    "bias": lambda value: value in get_args(BiasMode),
}


def own_metadata(
    config: Mapping[str, Any], metadata: Mapping[str, str], path: Path
) -> dict[str, Any]:
    """What we wrote beside PEFT's own; empty for a file of another's.

    Raises:
        FormatError: it cannot be read, or goes with another config.
    """
    if METADATA not in metadata:
        return {}
    own = parse_json(metadata[METADATA], f"the metadata of {path / TENSORS}")
    if wrong := [key for key, is_right in _OWN.items() if key in own and not is_right(own[key])]:
        raise FormatError(
            f"{path / TENSORS}: its metadata cannot be read: {', '.join(wrong)}.",
            remedy="It was edited, or is damaged: save again.",
        )
    if own.get("config", config_digest(config)) != config_digest(config):
        raise FormatError(
            f"{path}: {CONFIG} and {TENSORS} are not of one save.",
            remedy="A save was interrupted, or one was edited: save again.",
        )
    return own


class Scalings:
    """Rank and alpha of each layer as the config says."""

    def __init__(self, config: Mapping[str, Any], alpha: float | None, path: Path) -> None:
        if "lora_alpha" not in config and alpha is None and config.get("peft_type") != ALONE:
            raise FormatError(
                f"{path} has no lora_alpha, so that the scaling is not known.",
                remedy="Say it: load(..., alpha=16).",
            )
        self.path = path
        self.alpha = config.get("lora_alpha", alpha)
        self.r = config.get("r", 8)
        self.rule = "rslora" if config.get("use_rslora") else "lora"
        limits = Limits(SECONDS, CHARACTERS)
        self.ranks = self._patterns(config, "rank_pattern", limits)
        self.alphas = self._patterns(config, "alpha_pattern", limits)

    def _patterns(self, config: Mapping[str, Any], key: str, limits: Limits) -> Patterns:
        given = config.get(key) or {}
        if not isinstance(given, dict):
            raise FormatError(f"{self.path}: {key} must be an object, not {given!r}.")
        return Patterns(given, self.path, limits)

    def rank_of(self, path: str) -> Any:
        """What the config calls the rank of a layer."""
        return self.ranks.find(path, self.r)

    def alpha_of(self, path: str, A_rank: int) -> float:
        """The alpha of a layer, to be divided by what the config calls its rank."""
        r, alpha = self.rank_of(path), self.alphas.find(path, self.alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise FormatError(f"{self.path}: the alpha of {path} is {alpha!r}, which is no number.")
        if not 0 < abs(alpha) <= sys.float_info.max:
            raise FormatError(f"{self.path}: the alpha of {path} is {alpha!r}.")
        if r != A_rank:
            raise FormatError(
                f"{self.path} gives {path} the rank {r!r}, and its tensors have {A_rank}."
            )
        return float(alpha)


def config_digest(config: Mapping[str, Any]) -> str:
    """A short name for what the config says of the tensors, which other edits leave as it is."""
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters")
    ids = [config[k] for k in ("trainable_token_indices", "token_indices") if config.get(k)]
    text = json.dumps([*(config.get(key) for key in keys), *ids], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
