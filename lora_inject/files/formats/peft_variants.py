"""Variants of LoRA in PEFT's files: the tensors that they have besides A and B, and its words."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.one_place import Given, is_repeated
from lora_inject.files.formats.pairs import config_rank
from lora_inject.kinds import find_kind
from lora_inject.kinds.base import is_plain
from lora_inject.settings import Settings
from lora_inject.starts import OLoRA, PiSSA, Start
from lora_inject.variants import SCALINGS, VARIANTS, Variant

_ROLES = {key: role for variant in VARIANTS.values() for role, key in variant.keys.items()}
# In files of several ages a module stands around the tensor, with the adapter's name or without.
_KEY = rf"(?:base_model\.model\.)?(.+)\.({'|'.join(_ROLES)})(?:(?:\.default)?\.weight)?"
_REMADE: Mapping[str, Start] = {"pissa": PiSSA(exact=True), "olora": OLoRA()}
Others = dict[str, dict[str, Tensor]]  # by the path in the file and by role


def without_others(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Others]:
    """The tensors of a file without those of variants, and these.

    Raises:
        FormatError: one of them is there twice, with two values.
    """
    rest: dict[str, Tensor] = {}
    others: Others = {}
    given = Given()
    for key, tensor in tensors.items():
        match = re.fullmatch(_KEY, key)
        if match is None:
            rest[key] = tensor
        elif not is_repeated(given, match.groups(), key, tensor):
            others.setdefault(match[1], {})[_ROLES[match[2]]] = tensor
    return rest, others


def variant_of(config: Mapping[str, Any]) -> type[Variant]:
    """The variant that a config asks for."""
    asked = [v for v in VARIANTS.values() if v.peft and all(config.get(k) for k in v.peft)]
    return asked[0] if asked else Variant


def with_others(
    pairs: Iterable[PairData], others: Others, config: Mapping[str, Any], where: object
) -> list[PairData]:
    """The pairs with the tensors of their variant.

    Raises:
        FormatError: one is missing or too many, or PEFT computes otherwise with it.
    """
    variant, left, found = variant_of(config), {**others}, []
    for pair in pairs:
        own = {role: tensor.flatten() for role, tensor in left.pop(pair.path, {}).items()}
        if own.keys() != set(variant.more):
            raise FormatError(
                f"{where}: {pair.name} has {sorted(own) or 'nothing'} besides A and B, and its "
                f"config asks for {sorted(variant.more) or 'nothing'}.",
                remedy="Save it whole with PEFT (save_pretrained), tensors and config together.",
            )
        if own:
            _require_same_rows(pair)
        found.append(replace(pair, variant=variant.name, others=own))
    if left:
        raise FormatError(f"{where}: {next(iter(left))} has no A and B.")
    return found


@torch.no_grad()
def with_moved_base(
    pairs: Iterable[PairData],
    config: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    where: object,
) -> list[PairData]:
    """Pairs of a directory whose base PEFT has moved, with their start, which it took from there.

    PEFT computes ``W - s B0 A0 + s B A``, with B0 A0 from W; here W stays, and the rank is twice.

    Raises:
        FormatError: the start cannot be made again.
    """
    word, found = config.get("init_lora_weights"), []
    for pair in pairs:
        layer = modules.get(pair.path)
        kind = None if layer is None else find_kind(layer)
        weight = None if layer is None else layer._parameters.get(pair.weight)
        if (
            layer is None or kind is None or weight is None or pair.form != "linear"
            or weight.dtype != torch.float32 or not is_plain(weight) or pair.others
        ):  # fmt: skip
            raise FormatError(
                f"{where}: init_lora_weights={word!r} has moved the weights of the base, and for "
                f"{pair.name} that cannot be made again without its float32 weights.",
                remedy="Load it into the base in float32; or let PEFT convert it: "
                "save_pretrained(path_initial_model_for_weight_conversion=...).",
            )
        (spec,) = kind.specs(layer, Settings(pair.rank, 1.0, 0.0))
        start = _REMADE[str(word)]
        A0, B0 = start.values(kind, layer, weight, spec, pair.scaling, torch.Generator())
        A, B = torch.cat([pair.A.to(A0), A0]), torch.cat([pair.B.to(B0), -B0], 1)
        alpha = SCALINGS[pair.rule].alpha(pair.scaling, 2 * pair.rank)
        found.append(replace(pair, A=A, B=B, alpha=alpha, start=start.name))
    return found


def keys_of_others(pairs: Iterable[PairData], prefix: str) -> dict[str, Tensor]:
    """The tensors of variants by PEFT's keys.

    Raises:
        FormatError: PEFT has no word for one of them, or computes otherwise.
    """
    keys: dict[str, Tensor] = {}
    for pair in pairs:
        for role, tensor in pair.others.items():
            _require_same_rows(pair)
            if pair.form == "conv":  # in the shape of an output
                tensor = tensor.reshape(1, -1, *(1,) * (pair.A.dim() - 2))
            keys[f"{prefix}{pair.path}.{VARIANTS[pair.variant].keys[role]}"] = tensor
    return keys


def words_of(data: AdapterData) -> Mapping[str, Any]:
    """What a config says of the variant of all pairs.

    Raises:
        FormatError: they have several.
    """
    names = {pair.variant for pair in data.pairs}
    if len(names) > 1:
        raise FormatError(f"PEFT has one variant for all layers, and here are {sorted(names)}.")
    variant = VARIANTS[names.pop()] if names else Variant
    if variant is not Variant and not variant.peft:
        raise FormatError(
            f"PEFT has no {variant.name}.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
    return variant.peft


def _require_same_rows(pair: PairData) -> None:
    """Refuse what PEFT has no such variant for, or takes the length of other rows."""
    grouped = config_rank(pair) != pair.rank
    if grouped or pair.part or pair.form in ("experts", "other") or pair.weight != "weight":
        kind = "grouped" if grouped else "of a kind"
        raise FormatError(
            f"{pair.name} is {kind} where PEFT's {pair.variant} is not the same.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
