"""PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT, vLLM and diffusers read. The format is PEFT's (checked against 0.21); what it has no word
for (parts, several dropouts, the fingerprint of the base) stands in the metadata of the tensors'
file, which PEFT ignores.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_inject.errors import FormatError
from lora_inject.files.formats import peft_rows
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import (
    divided,
    over_all_channels,
    told_layout,
    whole_layers,
    with_whole_attention,
)
from lora_inject.files.formats.peft_bias import added_biases, without_lora_bias
from lora_inject.files.formats.peft_config import (
    CONFIG,
    METADATA,
    TENSORS,
    Scalings,
    check_config,
    config_digest,
    own_metadata,
    target_labels,
    to_config,
    to_metadata,
)
from lora_inject.files.formats.peft_nested import nested_parameters, unwrapped
from lora_inject.files.formats.peft_variants import (
    as_told,
    keys_of_others,
    with_others,
    without_others,
    words_of,
)
from lora_inject.files.formats.storage import (
    read_json,
    read_tensors,
    replaced_together,
    write_json,
    write_tensors,
)
from lora_inject.kinds.base import Form
from lora_inject.variants import SCALINGS

PREFIX = "base_model.model."
OUT_PROJ = ".base_layer.out_proj"  # of nn.MultiheadAttention, inside of PEFT's layer for it
# PEFT adds the update of an nn.MultiheadAttention's out_proj twice (merge of its MultiheadAttention
# layer, seen in 0.21): what a file means is what PEFT computes from it.
_TIMES = 2
_KEY = r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)"


def tensor_key(form: Form, path: str, letter: str) -> str:
    """The key of A or B of a module."""
    name = f"lora_embedding_{letter}" if form == "embedding" else f"lora_{letter}.weight"
    return f"{PREFIX}{path}.{name}"


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
    check_config(config, path / CONFIG)
    own = own_metadata(metadata, path)
    if own.get("config", config_digest(config)) != config_digest(config):
        raise FormatError(
            f"{path}: {CONFIG} and {TENSORS} are not of one save.",
            remedy="A save was interrupted, or one was edited: save again.",
        )
    tensors, rows = peft_rows.without_rows(tensors, config, path)
    tensors, betas = without_lora_bias(tensors)
    tensors, of_variants = without_others(tensors)
    found, others = _pairs(tensors, path)
    scalings = Scalings(config, alpha, path / CONFIG)
    nested = nested_parameters(config, found, model)
    weights = dict.fromkeys((k.removesuffix(OUT_PROJ) for k in found if k.endswith(OUT_PROJ)),
                            "in_proj_weight")  # fmt: skip
    if model is None:  # which parameter it is of several is then open
        owners = [name.rpartition(".")[0] for name in config.get("target_parameters") or ()]
        weights |= {k: "" for k in found if any(unwrapped(k).endswith(own) for own in owners)}
    for key in own.get("padding", ()):  # halves of attention that were never adapted
        found.pop(key, None)
    pairs: list[PairData] = []
    for key, (form, A, B) in found.items():
        pairs += _pair(key, form, A, B, scalings, nested, weights, own.get("parts", {}), path)
    pairs = with_others(pairs, of_variants, config, path)
    added = added_biases(betas, pairs, config, path)
    pairs = as_told(pairs, own, float(config.get("lora_dropout") or 0.0))
    return AdapterData(
        pairs=tuple(pairs),
        tensors=others,
        bias="lora_only" if added and config.get("bias") != "all" else config.get("bias") or "none",
        train_also=tuple(own.get("train_also") or config.get("modules_to_save") or ()),
        targets=tuple(own.get("targets") or target_labels(config.get("target_modules"))),
        base=own.get("base", {}),
        base_name=config.get("base_model_name_or_path") or "",
        task=config.get("task_type") or "",
        facts={
            "format": "PEFT",
            "config": config,
            "base_weights": [_base_name(k) for k in tensors if k.endswith(".base_layer.weight")],
            **({"train_also": own["train_also"]} if "train_also" in own else {}),
        },
        rows=rows,
        added=added,
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
    for name, why in data.facts.get("refused", {}).items():
        raise FormatError(f"{name} {why}.", remedy='Save it as "loralib".')
    for pair in data.pairs:
        if pair.form == "other":
            raise FormatError(
                f"{pair.name} is of a kind that PEFT has no adapter for, or computes otherwise.",
                remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
            )
        known = pair.form == "experts" or pair.weight in ("weight", "in_proj_weight")
        if not known or not pair.path:
            raise FormatError(f"{pair.name or 'the model itself'} is nothing that PEFT can adapt.")
    whole = with_whole_attention(whole_layers(data.pairs))
    tensors = _tensors(whole) | keys_of_others(whole, PREFIX) | peft_rows.keys_of(data, PREFIX)
    if whole:
        config = {**to_config(data, whole), **words_of(data), **peft_rows.words_of(data)}
    else:
        config = peft_rows.config_alone(data)
    inside = {peft_rows.in_wrapper(name, data): tensor for name, tensor in data.tensors.items()}
    tensors |= {_base_key(name, whole): tensor for name, tensor in inside.items()}
    own = {(pair.path, pair.weight) for pair in data.pairs}
    padding = [p.path.removesuffix(".out_proj") + OUT_PROJ if p.in_attention else p.path
               for p in whole if (p.path, p.weight) not in own]  # fmt: skip
    return config, tensors, json.dumps({**to_metadata(data, whole, config), "padding": padding})


Found = dict[str, tuple[Form, Tensor, Tensor]]


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> tuple[Found, dict[str, Tensor]]:
    """(pairs by the path in the file, all other tensors by their name in the base)."""
    halves: dict[str, dict[str, tuple[Form, Tensor]]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(_KEY, key)
        if match is None:
            if ".lora_" in key:
                raise FormatError(f"{path}: the tensor {key} is of no kind that is supported.")
            if ".original_module." not in key:
                others[_base_name(key)] = tensor
            continue
        form: Form = "embedding" if match[2] else "conv" if tensor.dim() > 2 else "linear"
        halves.setdefault(match[1], {})[match[3]] = (form, tensor)
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise FormatError(f"{path}: {name} has only {' and '.join(half)} of lora_A and lora_B.")
    return {n: (half["A"][0], half["A"][1], half["B"][1]) for n, half in halves.items()}, others


def _base_name(key: str) -> str:
    """The name of a base tensor, without what PEFT's wrappers put in."""
    name = re.sub(rf"(\.{peft_rows.WRAPPER})?(\.base_layer)+\.", ".", key.removeprefix(PREFIX))
    return re.sub(r"\.modules_to_save\.(default\.)?", ".", name)


def _pair(
    key: str,
    form: Form,
    A: Tensor,
    B: Tensor,
    scalings: Scalings,
    nested: Mapping[str, tuple[nn.Module, str, str]],
    weights: Mapping[str, str],
    parts: Mapping[str, Any],
    path: Path,
) -> list[PairData]:
    if key in nested:
        module, name, weight = nested[key]
        W = module._parameters[weight]
        assert W is not None
        experts = W.shape[0] if W.dim() == 3 else 1
        if A.shape[0] % experts or B.shape[-1] != A.shape[0]:
            raise FormatError(f"{path}: {key} does not divide into {experts} experts.")
        layout = told_layout(module, W)
        if W.dim() == 3:
            A = A.reshape(experts, -1, A.shape[-1])
            B = B.reshape(B.shape[0], -1, experts).permute(2, 0, 1)
        alpha = scalings.alpha_of(f"{name}.{weight}", A.shape[-2])
        return [PairData(name, A, B, alpha, "experts", weight, layout=layout, rule=scalings.rule)]
    name, in_attention = key.replace(".base_layer.", "."), key.endswith(OUT_PROJ)
    if in_attention:
        B = B * _TIMES
    PairData(name, A, B, None)  # checked before its shapes are read
    groups = max(1, A.shape[0] // B.shape[1])  # of a convolution: its rank counts all of them
    rule, alpha = SCALINGS[scalings.rule], scalings.alpha_of(name, A.shape[0])
    if groups > 1:
        alpha = rule.alpha(rule.factor(alpha, A.shape[0]), A.shape[0] // groups)
    weight = weights.get(key, "weight")
    data = PairData(name, A, B, alpha, form, weight, in_attention=in_attention, rule=rule.name)
    return [data] if name not in parts else list(divided(data, parts[name], path))


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
        keys[tensor_key(pair.form, path, "A")] = over_all_channels(pair)
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


def _base_key(name: str, pairs: Iterable[PairData]) -> str:
    """The key of a base tensor: PEFT keeps an adapted layer under ``base_layer``."""
    owner, _, tensor = name.rpartition(".")
    for pair in pairs:
        if pair.in_attention and owner == pair.path:
            head = owner.removesuffix(".out_proj")
            return f"{PREFIX}{head}{OUT_PROJ}.base_layer.{tensor}"
    nested = sum(pair.path == owner for pair in pairs)
    return f"{PREFIX}{owner}.{'base_layer.' * nested}{tensor}"
