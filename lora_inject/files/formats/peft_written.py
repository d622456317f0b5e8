"""What is written into PEFT's ``adapter_config.json``, and into the metadata beside it."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import config_rank
from lora_inject.files.formats.peft_config import config_digest
from lora_inject.files.formats.peft_keys import Names, is_like_ours
from lora_inject.files.formats.peft_targets import target_names
from lora_inject.printing import few
from lora_inject.variants import SCALINGS, Scaling


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
    said = still_said(data)
    return {
        "peft_type": "LORA",
        "task_type": None if said.get("auto_mapping") else data.task or None,  # PEFT wants one
        "base_model_name_or_path": data.base_name or None,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else max(dropouts),
        "bias": _bias(data),
        "target_modules": target_names([p.path for p in modules], data.modules),
        "target_parameters": [_target(p) for p in parameters] or None,
        "modules_to_save": _modules_to_save(data) or None,
        "rank_pattern": pattern_of({k: v for k, v in ranks.items() if v != r}, ranks),
        "alpha_pattern": pattern_of({k: v for k, v in alphas.items() if v != alpha}, alphas),
        "fan_in_fan_out": bool(transposed) and all(transposed),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **rule.peft,
        **said,
    }


def _alpha(pair: PairData, rule: Scaling) -> float:
    """The alpha of a pair by the rule of the whole config, for what PEFT calls its rank."""
    r = config_rank(pair)
    same = pair.rule == rule.name and r == pair.rank
    return pair.known_alpha if same else rule.alpha(pair.scaling, r)


def _bias(data: AdapterData) -> str:
    """The bias mode; "none" where there is no bias, since vLLM refuses the other words."""
    tops = tuple(f"{path}." for path in data.train_also)
    if data.bias and all(f"{name}.".startswith(tops) for name in data.tensors):
        return "none"
    return data.bias or _guessed_bias(data)


def _guessed_bias(data: AdapterData) -> str:
    """The bias mode of tensors of which a file says nothing else.

    Raises:
        FormatError: they are not the biases of adapted layers.
    """
    layers = {f"{pair.path}.bias" for pair in data.pairs}
    if not data.tensors.keys() <= layers:
        raise FormatError(
            "the file does not say what was trained besides A and B, of which it holds "
            f"{few(sorted(data.tensors.keys() - layers))}.",
            remedy="Load it into its model, and save it there.",
        )
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


def pattern_of(values: Mapping[str, Any], of_all: Mapping[str, Any]) -> dict[str, Any]:
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
    paths = [f"{p.path}." for p in data.pairs]
    names = [path[:-1] for path in paths if Names(()).tensor(path) != path]
    names += filter(is_like_ours, data.tensors)
    return {
        "config": config_digest(config),
        "targets": list(data.targets),
        "train_also": list(data.train_also),
        "base": dict(data.base),
        **({"parts": parts} if parts else {}),
        **({"dropout": dropouts} if dropouts else {}),
        **({"fixed": fixed} if fixed else {}),
        **({"rows": dict(data.rows)} if data.rows else {}),
        **({"untouched": dict(data.untouched)} if data.untouched else {}),
        **({"beside": list(data.beside)} if data.beside else {}),
        **({"start": starts} if starts else {}),
        **({"drops": drops} if drops else {}),
        **({"names": names} if names else {}),
        **({"dtype": data.dtype} if data.dtype else {}),
        **({"bias": data.bias} if data.bias not in ("", config.get("bias")) else {}),
    }


def still_said(data: AdapterData) -> dict[str, Any]:
    """What the config that was loaded said besides, where it is true of the model as it is."""
    said = dict(data.said)
    classes = said.get("auto_mapping")
    own = classes.get("base_model_class") if isinstance(classes, Mapping) else None
    if data.model_class and own != data.model_class:
        said.pop("auto_mapping", None)
    if data.base_name and data.base_name != said.get("base_model_name_or_path"):
        said.pop("revision", None)  # of the other base
        said["base_model_name_or_path"] = data.base_name
    return said
