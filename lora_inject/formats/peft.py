"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT, vLLM and diffusers read. The format is PEFT's (checked against 0.21); what it has no word
for (parts, several dropouts, the fingerprint of the base) stands in the metadata of the tensors'
file, which PEFT ignores.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import regex
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_inject.errors import FormatError
from lora_inject.formats.data import AdapterData, PairData
from lora_inject.formats.storage import (
    read_json,
    read_tensors,
    replaced_together,
    write_json,
    write_tensors,
)
from lora_inject.kinds.base import Form
from lora_inject.settings import BiasMode
from lora_inject.targets import REGEX_SECONDS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OUT_PROJ = ".base_layer.out_proj"  # of nn.MultiheadAttention, inside of PEFT's layer for it
METADATA = "lora_inject"

# Keys of the config that change nothing about what the tensors mean.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
    "qalora_group_size", "eva_config", "ensure_weight_tying",
}  # fmt: skip
# Starting values that leave the base as it is; all others move it, and the file does not say how.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


# PEFT adds the update of an nn.MultiheadAttention's out_proj twice (merge of its MultiheadAttention
# layer, seen in 0.21): what a file means is what PEFT computes from it.
_TIMES = 2


def tensor_key(form: Form, path: str, letter: str) -> str:
    """The key of A or B of a module."""
    name = f"lora_embedding_{letter}" if form == "embedding" else f"lora_{letter}.weight"
    return f"{PREFIX}{path}.{name}"


_KEY = regex.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")


def looks_like(path: Path) -> bool:
    """Whether it is a directory as PEFT writes it."""
    return path.is_dir() and (path / CONFIG).exists()


def read(path: Path, model: nn.Module | None = None, alpha: float | None = None) -> AdapterData:
    """Read a PEFT directory.

    Args:
        path: the directory.
        model: the model that it is for; without one, fused parameters stay as they are in the file.
        alpha: for a config without ``lora_alpha``, of which PEFT would silently make 8.

    Raises:
        FormatError: a file is not there or not whole, or says what cannot be honoured.
    """
    if not path.is_dir():
        raise FormatError(f"{path} is no directory with an {CONFIG}.")
    if (path / "adapter_model.bin").exists() and not (path / TENSORS).exists():
        raise FormatError(
            f"{path} holds adapter_model.bin, which is a pickle.",
            remedy=f"Save it as {TENSORS} where you trust it.",
        )
    config = read_json(path / CONFIG)
    return from_tensors(config, *read_tensors(path / TENSORS), path, model, alpha)


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    model: nn.Module | None,
    alpha: float | None,
) -> AdapterData:
    """What PEFT's config and tensors say; ``path`` is for errors."""
    _check_config(config, path / CONFIG)
    own = _own_metadata(metadata, path)
    if own.get("config", _digest(config)) != _digest(config):
        raise FormatError(
            f"{path}: {CONFIG} and {TENSORS} are not of one save.",
            remedy="A save was interrupted, or one was edited: save again.",
        )
    found, others = _pairs(tensors, path)
    scalings = _Scalings(config, alpha, path / CONFIG)
    nested = _nested_parameters(config, found, model)
    weights = dict.fromkeys((k.removesuffix(OUT_PROJ) for k in found if k.endswith(OUT_PROJ)),
                            "in_proj_weight")  # fmt: skip
    if model is None:  # which parameter it is of several is then open
        owners = [name.rpartition(".")[0] for name in config.get("target_parameters") or ()]
        weights |= {k: "" for k in found if any(_unwrapped(k).endswith(own) for own in owners)}
    pairs: list[PairData] = []
    for key, (form, A, B) in found.items():
        pairs += _pair(key, form, A, B, scalings, nested, weights, own.get("parts", {}), path)
    dropouts = own.get("dropout", {})
    dropout = float(config.get("lora_dropout") or 0.0)
    if dropout or dropouts:
        pairs = [replace(p, dropout=dropouts.get(p.path, dropout)) for p in pairs]
    return AdapterData(
        pairs=tuple(pairs),
        tensors=others,
        bias=config.get("bias") or "none",
        train_also=tuple(own.get("train_also") or config.get("modules_to_save") or ()),
        targets=tuple(own.get("targets") or _names(config.get("target_modules"))),
        base=own.get("base", {}),
        base_name=config.get("base_model_name_or_path") or "",
        task=config.get("task_type") or "",
        facts={"format": "PEFT", "config": config},
    )


def write(data: AdapterData, path: Path) -> None:
    """Write a PEFT directory; files of other names that are there stay.

    Raises:
        FormatError: the adapter holds what PEFT cannot read, or the directory cannot be written.
    """
    config, tensors, own = to_tensors(data)
    with replaced_together(path / CONFIG, path / TENSORS) as (config_file, tensors_file):
        write_json(config, config_file)
        write_tensors(tensors, tensors_file, {"format": "pt", METADATA: own})


def to_tensors(data: AdapterData) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """PEFT's config, its tensors, and the metadata that is ours.

    Raises:
        FormatError: the adapter holds what PEFT cannot read.
    """
    for pair in data.pairs:
        if pair.form == "other":
            raise FormatError(
                f"{pair.name} is of a kind that PEFT has no adapter for, or computes otherwise.",
                remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
            )
    whole = _with_whole_attention(whole_layers(data.pairs))
    tensors, config = _tensors(whole), _config(data, whole)
    tensors |= {_base_key(name, whole): tensor for name, tensor in data.tensors.items()}
    return config, tensors, json.dumps(_metadata(data, config))


def portable(data: AdapterData) -> AdapterData:
    """The same updates with one rank and a scaling of 1 for all, for readers of no patterns.

    Ranks are padded with zeros, and scalings are folded into B.
    """
    pairs = _with_whole_attention(whole_layers(data.pairs))
    r = max(_config_rank(pair) for pair in pairs)
    return replace(data, pairs=tuple(_padded(pair, r) for pair in pairs))


def _padded(pair: PairData, r: int) -> PairData:
    groups = _config_rank(pair) // pair.rank
    if r % groups:
        raise FormatError(f"{pair.name}: rank {r} does not divide into its {groups} groups.")
    extra, B = r // groups - pair.rank, (pair.B.double() * pair.scaling).to(pair.B.dtype)
    if pair.form == "experts":
        A, B = F.pad(pair.A, (0, 0, 0, extra)), F.pad(B, (0, extra))
    else:
        ends = [0, 0] * (B.dim() - 2)
        A = pair.A.reshape(groups, -1, *pair.A.shape[1:])
        A = F.pad(A, (*[0, 0] * (A.dim() - 2), 0, extra)).flatten(0, 1)
        B = F.pad(B, (*ends, 0, extra))
    return replace(pair, A=A, B=B, alpha=float(r // groups))


# --- reading ------------------------------------------------------------------------------------


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise FormatError(f"{path}: peft_type is {config.get('peft_type')!r}, not 'LORA'.")
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise FormatError(f"{path}: {key}={value!r} is not supported.")
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


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _own_metadata(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if METADATA not in metadata:
        return {}
    try:
        own = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path / TENSORS}: its metadata is no JSON: {error}.") from error
    if not isinstance(own, dict):
        raise FormatError(f"{path / TENSORS}: its metadata is not a JSON object.")
    dropouts = own.get("dropout", {})
    wrong = [key for key in ("targets", "train_also") if not _is_names(own.get(key, []))]
    wrong += [key for key in ("base", "parts", "dropout") if not isinstance(own.get(key, {}), dict)]
    if wrong or not all(isinstance(p, int | float) and 0 <= p < 1 for p in dropouts.values()):
        raise FormatError(f"{path / TENSORS}: its metadata cannot be read: {wrong or dropouts}.")
    return own


def _names(target_modules: Any) -> tuple[str, ...]:
    if isinstance(target_modules, str):
        return (target_modules,)
    return tuple(map(str, target_modules)) if isinstance(target_modules, list) else ()


Found = dict[str, tuple[Form, Tensor, Tensor]]


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> tuple[Found, dict[str, Tensor]]:
    """(pairs by the path in the file, all other tensors by their name in the base)."""
    halves: dict[str, dict[str, tuple[Form, Tensor]]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            if ".lora_" in key:
                raise FormatError(f"{path}: the tensor {key} is of no kind that is supported.")
            others[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        form: Form = "embedding" if match[2] else "conv" if tensor.dim() > 2 else "linear"
        halves.setdefault(match[1], {})[match[3]] = (form, tensor)
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise FormatError(f"{path}: {name} has only {' and '.join(half)} of lora_A and lora_B.")
    return {n: (half["A"][0], half["A"][1], half["B"][1]) for n, half in halves.items()}, others


class _Scalings:
    """Rank and alpha of each layer as the config says."""

    def __init__(self, config: Mapping[str, Any], alpha: float | None, path: Path) -> None:
        if "lora_alpha" not in config and alpha is None:
            raise FormatError(
                f"{path} has no lora_alpha, so that the scaling is not known.",
                remedy="Say it: load(..., alpha=16).",
            )
        self.path = path
        self.alpha = config.get("lora_alpha", alpha)
        self.r = config.get("r", 8)
        self.rslora = bool(config.get("use_rslora"))
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
        return alpha * math.sqrt(A_rank) if self.rslora else float(alpha)

    def _find(self, patterns: Mapping[str, Any], path: str, default: Any) -> Any:
        for pattern, value in patterns.items():
            try:
                if regex.match(rf"(.*\.)?({pattern})$", path, timeout=REGEX_SECONDS):
                    return value
            except (regex.error, TimeoutError, RecursionError) as error:
                raise FormatError(
                    f"{self.path}: the pattern {pattern[:80]!r} cannot be used: {error}."
                ) from error
        return default


def _nested_parameters(
    config: Mapping[str, Any], found: Iterable[str], model: nn.Module | None
) -> dict[str, tuple[nn.Module, str, str]]:
    """(module, its path, parameter) of each fused parameter, by the path in the file.

    PEFT wraps the parameters of a module one around the other, in their order in the module, so
    that the last one is the outermost.
    """
    wanted, paths = tuple(config.get("target_parameters") or ()), list(found)
    if not wanted or model is None:
        return {}
    modules, result = dict(model.named_modules()), {}
    for path in {_unwrapped(name) for name in paths}:
        module = modules.get(path)
        if module is None:
            continue
        own = [
            name
            for name, _ in module.named_parameters(recurse=False)
            if any(f"{path}.{name}" == w or f"{path}.{name}".endswith("." + w) for w in wanted)
        ]
        for depth, name in enumerate(reversed(own)):
            result[path + ".base_layer" * depth] = (module, path, name)
    return result


def _unwrapped(path: str) -> str:
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path


def _pair(
    key: str,
    form: Form,
    A: Tensor,
    B: Tensor,
    scalings: _Scalings,
    nested: Mapping[str, tuple[nn.Module, str, str]],
    weights: Mapping[str, str],
    parts: Mapping[str, Any],
    path: Path,
) -> list[PairData]:
    if key in nested:
        module, name, weight = nested[key]
        W = module.get_parameter(weight)
        experts = W.shape[0] if W.dim() == 3 else 1
        if A.shape[0] % experts or B.shape[-1] != A.shape[0]:
            raise FormatError(f"{path}: {key} does not divide into {experts} experts.")
        layout = told_layout(module, W)
        if W.dim() == 3:
            A = A.reshape(experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        alpha = scalings.alpha_of(f"{name}.{weight}", A.shape[-2])
        return [PairData(name, A, B, alpha, "experts", weight, layout=layout)]
    name, in_attention = key.replace(".base_layer.", "."), key.endswith(OUT_PROJ)
    if in_attention:
        B = B * _TIMES
    PairData(name, A, B, None)  # checked before its shapes are read
    groups = max(1, A.shape[0] // B.shape[1])  # of a convolution: its rank counts all of them
    alpha = scalings.alpha_of(name, A.shape[0]) / groups
    data = PairData(name, A, B, alpha, form, weights.get(key, "weight"), in_attention=in_attention)
    return [data] if name not in parts else list(_divided(data, parts[name], path))


def told_layout(module: nn.Module, parameter: Tensor) -> str:
    """How PEFT reads a fused parameter: as its module says, else (E, out, in)."""
    transposed = parameter.dim() == 3 and getattr(module, "is_transposed", False)
    return "in_out" if transposed else "out_in"


def _divided(pair: PairData, parts: Any, path: Path) -> Iterable[PairData]:
    """The parts of a pair that ``whole_layers`` has put together."""
    try:
        rows = [(str(p), int(s), int(n), int(r), float(a)) for p, s, n, r, a in parts["parts"]]
        total = int(parts["total"])
    except (TypeError, ValueError, KeyError) as error:
        raise FormatError(f"{path}: the parts of {pair.name} cannot be read.") from error
    first = 0
    for part, start, size, r, alpha in rows:
        A, B = pair.A[first : first + r], pair.B[start : start + size, first : first + r]
        yield replace(pair, A=A, B=B, alpha=alpha, part=part, span=(start, total))
        first += r


# --- writing ------------------------------------------------------------------------------------


def whole_layers(pairs: Iterable[PairData]) -> list[PairData]:
    """Parts of one layer as one pair: their ranks side by side, each with its rows of B."""
    groups: dict[tuple[str, str], list[PairData]] = {}
    for pair in pairs:
        groups.setdefault((pair.path, pair.weight), []).append(pair)
    return [_joined(own) if own[0].part else own[0] for own in groups.values()]


def _joined(parts: list[PairData]) -> PairData:
    scaling = parts[0].scaling
    blocks = []
    for pair in parts:
        start, total = pair.span
        # Parts of one adapter have one scaling.
        blocks.append(F.pad(pair.B, (0, 0, start, total - start - pair.B.shape[0])))
    A, B = torch.cat([pair.A for pair in parts]), torch.cat(blocks, 1)
    return replace(parts[0], A=A, B=B, alpha=scaling * B.shape[1], part="", span=(0, 0))


def _with_whole_attention(pairs: list[PairData]) -> list[PairData]:
    """PEFT adapts nn.MultiheadAttention with its out_proj, at one rank and alpha, or not at all.

    What is missing is zero, and the smaller rank is padded.
    """
    heads = {p.path: p for p in pairs if p.weight == "in_proj_weight"}
    outs = {p.path: p for p in pairs if p.in_attention}
    result = [p for p in pairs if p.path not in heads and p.path not in outs]
    for path in dict.fromkeys([*heads, *(p.removesuffix(".out_proj") for p in outs)]):
        head, out = heads.get(path), outs.get(f"{path}.out_proj")
        if head and out and (head.rank, head.alpha) != (out.rank, out.alpha):
            r = max(head.rank, out.rank)
            head, out = _padded(head, r), _padded(out, r)
        like = head or out
        assert like is not None
        A, width = torch.zeros_like(like.A), like.A.shape[1]
        if head is None:
            B = like.B.new_zeros(3 * width, like.rank)
            head = replace(like, path=path, A=A, B=B, weight="in_proj_weight", in_attention=False)
        if out is None:
            B, name = like.B.new_zeros(width, like.rank), f"{path}.out_proj"
            out = replace(like, path=name, A=A, B=B, weight="weight", in_attention=True)
        result += [head, out]
    return result


def _tensors(pairs: Iterable[PairData]) -> dict[str, Tensor]:
    experts: dict[str, list[PairData]] = {}
    keys: dict[str, Tensor] = {}
    for pair in pairs:
        if pair.form == "experts":
            experts.setdefault(pair.path, []).append(pair)
            continue
        path = pair.path
        if pair.in_attention:
            path = path.removesuffix(".out_proj") + OUT_PROJ
        keys[tensor_key(pair.form, path, "A")] = _over_all_channels(pair)
        keys[tensor_key(pair.form, path, "B")] = pair.B / (_TIMES if pair.in_attention else 1)
    for path, own in experts.items():
        for depth, pair in enumerate(reversed(own)):  # in the module's order, the last outermost
            A, B = pair.A, pair.B
            if A.dim() == 3:
                A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
            nested = path + ".base_layer" * depth
            keys[tensor_key("linear", nested, "A")] = A
            keys[tensor_key("linear", nested, "B")] = B
    return keys


def _over_all_channels(pair: PairData) -> Tensor:
    """A of a grouped convolution as PEFT has it: for all channels, zero outside of its group."""
    groups = _config_rank(pair) // pair.rank
    if groups == 1:
        return pair.A
    A = pair.A.reshape(groups, pair.rank, *pair.A.shape[1:])
    whole = A.new_zeros(groups, pair.rank, groups, *A.shape[2:])
    for g in range(groups):
        whole[g, :, g] = A[g]
    return whole.reshape(groups * pair.rank, -1, *A.shape[3:])


def _base_key(name: str, pairs: Iterable[PairData]) -> str:
    """The key of a base tensor: PEFT keeps an adapted layer under ``base_layer``."""
    owner, _, tensor = name.rpartition(".")
    for pair in pairs:
        if pair.in_attention and owner == pair.path:
            head = owner.removesuffix(".out_proj")
            return f"{PREFIX}{head}{OUT_PROJ}.base_layer.{tensor}"
    adapted = {pair.path: pair for pair in pairs}
    nested = sum(p.path == owner for p in pairs) if owner in adapted else 0
    return f"{PREFIX}{owner}.{'base_layer.' * nested}{tensor}"


def _config_rank(pair: PairData) -> int:
    """What PEFT calls the rank: of a grouped convolution that of all groups together."""
    return pair.A.shape[0] if pair.form == "conv" else pair.rank


def _config(data: AdapterData, pairs: list[PairData]) -> dict[str, Any]:
    modules = [p for p in pairs if p.form != "experts" and not p.in_attention]
    parameters = [p for p in pairs if p.form == "experts"]
    ranks = {_target(p): _config_rank(p) for p in pairs if not p.in_attention}
    alphas = {_target(p): _number(p.scaling * _config_rank(p)) for p in pairs
              if not p.in_attention}  # fmt: skip
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
        "bias": data.bias,
        "target_modules": target_names([p.path for p in modules], data.modules),
        "target_parameters": [_target(p) for p in parameters] or None,
        "modules_to_save": list(data.train_also) or None,
        "rank_pattern": _pattern({k: v for k, v in ranks.items() if v != r}, ranks),
        "alpha_pattern": _pattern({k: v for k, v in alphas.items() if v != alpha}, alphas),
        "fan_in_fan_out": bool(transposed) and all(transposed),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


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
    return "|".join(map(escaped, sorted(paths)))


def escaped(path: str) -> str:
    """A path as an expression that matches it alone."""
    return path.replace(".", r"\.")


def _pattern(values: Mapping[str, Any], of_all: Mapping[str, Any]) -> dict[str, Any]:
    """``rank_pattern`` or ``alpha_pattern``: by a layer's last name where that is unambiguous."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        last = path.rpartition(".")[2]
        same = all(of_all[other] == value for other in of_all if other.rpartition(".")[2] == last)
        result[last if same and last.isidentifier() else f"^{escaped(path)}"] = value
    return result


def _metadata(data: AdapterData, config: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT has no word for."""
    parts: dict[str, Any] = {}
    for pair in data.pairs:
        if pair.part:
            own = parts.setdefault(pair.path, {"total": pair.span[1], "parts": []})
            own["parts"].append([pair.part, pair.span[0], pair.B.shape[0], pair.rank, pair.alpha])
    dropouts = {p.path: p.dropout for p in data.pairs if p.dropout != config["lora_dropout"]}
    return {
        "config": _digest(config),
        "targets": list(data.targets),
        "train_also": list(data.train_also),
        "base": dict(data.base),
        **({"parts": parts} if parts else {}),
        **({"dropout": dropouts} if dropouts else {}),
    }


def _digest(config: Mapping[str, Any]) -> str:
    """A short name for what the config says of the tensors, which other edits leave as it is."""
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_parameters")
    text = json.dumps([config.get(key) for key in keys], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
