"""PEFT's ``adapter_config.json``: what it says of ranks and scalings, and what we write into it."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from lora_inject.core.patterns import REGEX_SECONDS
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import config_rank
from lora_inject.files.formats.peft_rows import ALONE
from lora_inject.files.formats.storage import parse_json
from lora_inject.settings import BiasMode
from lora_inject.variants import FIXED, SCALINGS, Scaling

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
METADATA = "lora_inject"
# Keys of the config that change nothing about what the tensors mean.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora",
    "qalora_group_size", "eva_config", "ensure_weight_tying", "merge_weights", "loftq_config",
    "corda_config", "lora_ga_config", "trainable_token_indices", "token_indices", "init_weights",
    "lora_bias",
}  # fmt: skip
# Starting values that leave the base as it is; all others move it, and the file does not say how.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


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
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise FormatError(
            f"{path}: init_lora_weights={start!r} moves the weights of the base.",
            remedy="Let PEFT convert it: save_pretrained(path_initial_model_for_weight_conversion="
            "...).",
        )
    for key in ("modules_to_save", "target_parameters"):
        if not (config.get(key) is None or _is_names(config[key])):
            raise FormatError(f"{path}: {key} must be a list of names, not {config[key]!r}.")
    dropout, bias = config.get("lora_dropout") or 0.0, config.get("bias") or "none"
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise FormatError(f"{path}: lora_dropout must be a number in [0, 1), not {dropout!r}.")
    if bias not in get_args(BiasMode):
        raise FormatError(f"{path}: bias must be one of {get_args(BiasMode)}, not {bias!r}.")


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


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def own_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """What we wrote beside PEFT's own; empty for a file of another's.

    Raises:
        FormatError: it cannot be read.
    """
    if METADATA not in metadata:
        return {}
    own = parse_json(metadata[METADATA], f"the metadata of {path / TENSORS}")
    dropouts, drops = own.get("dropout", {}), own.get("drops", {})
    wrong = [key for key in ("targets", "train_also", "padding") if not _is_names(own.get(key, []))]
    maps = ("base", "parts", "dropout", "fixed", "drops")
    wrong += [key for key in maps if not isinstance(own.get(key, {}), dict)]
    if not wrong and not set(own.get("fixed", {}).values()) <= set(FIXED):
        wrong.append("fixed")
    if not wrong and not all(isinstance(d, list) and len(d) == 2 for d in drops.values()):
        wrong.append("drops")
    numbers = [] if wrong else [*dropouts.values(), *chain.from_iterable(drops.values())]
    if wrong or not all(isinstance(p, int | float) and 0 <= p < 1 for p in numbers):
        raise FormatError(f"{path / TENSORS}: its metadata cannot be read: {wrong or dropouts}.")
    return own


def target_labels(target_modules: Any) -> tuple[str, ...]:
    """``target_modules`` for people; which layers there are is told by the tensors."""
    if isinstance(target_modules, str):
        return (target_modules,)
    return tuple(map(str, target_modules)) if isinstance(target_modules, list) else ()


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
        self.ranks = self._patterns(config, "rank_pattern")
        self.alphas = self._patterns(config, "alpha_pattern")

    def _patterns(self, config: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise FormatError(f"{self.path}: {key} must be an object, not {value!r}.")
        return value

    def alpha_of(self, path: str, A_rank: int) -> float:
        """The alpha of a layer, to be divided by what the config calls its rank."""
        r, alpha = self._find(self.ranks, path, self.r), self._find(self.alphas, path, self.alpha)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise FormatError(f"{self.path}: the alpha of {path} is {alpha!r}, which is no number.")
        if not math.isfinite(alpha) or alpha == 0:
            raise FormatError(f"{self.path}: the alpha of {path} is {alpha!r}.")
        if r != A_rank:
            raise FormatError(
                f"{self.path} gives {path} the rank {r!r}, and its tensors have {A_rank}."
            )
        return float(alpha)

    def _find(self, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
        import regex  # which takes long to import, and few calls need it

        for pattern, value in patterns.items():
            try:
                if regex.match(rf"(.*\.)?({pattern})$", path, timeout=REGEX_SECONDS):
                    return value
            except (regex.error, TimeoutError, RecursionError) as error:
                raise FormatError(
                    f"{self.path}: the pattern {pattern[:80]!r} cannot be used: {error}."
                ) from error
        return default


def to_config(data: AdapterData, pairs: list[PairData]) -> dict[str, Any]:
    """The config for an adapter; ``pairs`` as they are written."""
    modules = [p for p in pairs if p.form != "experts" and not p.in_attention]
    parameters = [p for p in pairs if p.form == "experts"]
    ranks = {_target(p): config_rank(p) for p in pairs if not p.in_attention}
    rules = {pair.rule for pair in pairs}
    rule = SCALINGS[rules.pop() if len(rules) == 1 else "lora"]
    alphas = {_target(p): _number(_alpha(p, rule)) for p in pairs if not p.in_attention}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    dropouts = {p.dropout for p in pairs}
    transposed = [p.layout == "in_out" for p in modules if p.form == "linear"]
    return {
        "peft_type": "LORA",
        "task_type": data.task or None,
        "base_model_name_or_path": data.base_name or None,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else max(dropouts),
        "bias": data.bias or _guessed_bias(data),
        "target_modules": target_names([p.path for p in modules], data.modules),
        "target_parameters": [_target(p) for p in parameters] or None,
        "modules_to_save": _modules_to_save(data) or None,
        "rank_pattern": _pattern({k: v for k, v in ranks.items() if v != r}, ranks),
        "alpha_pattern": _pattern({k: v for k, v in alphas.items() if v != alpha}, alphas),
        "fan_in_fan_out": bool(transposed) and all(transposed),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **rule.peft,
    }


def _alpha(pair: PairData, rule: Scaling) -> float:
    """The alpha of a pair by the rule of the whole config, for what PEFT calls its rank."""
    r = config_rank(pair)
    same = pair.rule == rule.name and r == pair.rank
    return pair.known_alpha if same else rule.alpha(pair.scaling, r)


def _guessed_bias(data: AdapterData) -> str:
    """The bias mode of tensors of which a file says nothing else.

    Raises:
        FormatError: they are not the biases of adapted layers.
    """
    layers = {f"{pair.path}.bias" for pair in data.pairs}
    if not data.tensors.keys() <= layers:
        raise FormatError("what was trained besides A and B cannot be told without a model.")
    return "lora_only" if data.tensors else "none"


def _modules_to_save(data: AdapterData) -> list[str]:
    """The modules that trained in full, without those inside of others.

    Raises:
        FormatError: PEFT, which goes by the ends of names, would save another module too.
    """
    tops = [p for p in data.train_also if not any(p.startswith(f"{q}.") for q in data.train_also)]
    for path in data.modules or ():
        if path not in tops and path.endswith(tuple(tops)):
            raise FormatError(f"PEFT would take {path} for one of {tops}, which trained in full.")
    return tops


def _target(pair: PairData) -> str:
    return f"{pair.path}.{pair.weight}" if pair.form == "experts" else pair.path


def _number(value: float) -> float | int:
    """An alpha as people write it: PEFT's is an integer where it can be one."""
    near = round(value)
    return near if near == value else value


def target_names(paths: list[str], modules: Iterable[str] | None) -> list[str] | str:
    """``target_modules`` that select these modules and no others, by PEFT's rule of suffixes."""
    wanted, known = set(paths), set(paths if modules is None else modules)

    def selected(names: Iterable[str]) -> set[str]:
        ends = tuple(f".{name}" for name in names)
        return {path for path in known if path in names or path.endswith(ends)}

    short = sorted({path.rpartition(".")[2] for path in paths})
    if modules is not None and short and selected(short) == wanted:
        return short
    if selected(paths) == wanted:
        return sorted(paths)
    return "|".join(map(re.escape, sorted(paths)))


def _pattern(values: Mapping[str, Any], of_all: Mapping[str, Any]) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern``: by a layer's last name where that is unambiguous."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        last = path.rpartition(".")[2]
        same = all(of_all[other] == value for other in of_all if other.rpartition(".")[2] == last)
        result[last if same and last.isidentifier() else f"^{re.escape(path)}"] = value
    return result


def to_metadata(
    data: AdapterData, pairs: Iterable[PairData], config: Mapping[str, Any]
) -> dict[str, Any]:
    """What PEFT has no word for, for the metadata of the tensors' file."""
    parts: dict[str, Any] = {}
    for pair in data.pairs:
        if pair.part:
            own = parts.setdefault(pair.path, {"total": pair.span[1], "parts": []})
            alpha = pair.scaling * pair.rank
            own["parts"].append([pair.part, pair.span[0], pair.B.shape[0], pair.rank, alpha])
    dropouts = {p.path: p.dropout for p in data.pairs if p.dropout != config["lora_dropout"]}
    fixed = {p.path: p.fixed for p in data.pairs if p.fixed}
    starts = {p.path: p.start for p in pairs if p.start}  # but for what was padded
    drops = {p.path: [*p.drops] for p in data.pairs if any(p.drops)}
    more = {"parts": parts, "dropout": dropouts, "fixed": fixed, "start": starts, "drops": drops}
    return {
        "config": config_digest(config),
        "targets": list(data.targets),
        "train_also": list(data.train_also),
        "base": dict(data.base),
        **{key: value for key, value in more.items() if value},
    }


def config_digest(config: Mapping[str, Any]) -> str:
    """A short name for what the config says of the tensors, which other edits leave as it is."""
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters")
    ids = [config[k] for k in ("trainable_token_indices", "token_indices") if config.get(k)]
    text = json.dumps([*(config.get(key) for key in keys), *ids], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
