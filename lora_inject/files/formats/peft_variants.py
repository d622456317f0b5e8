"""Variants of LoRA in PEFT's files: the tensors that they have besides A and B, and its words."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_inject.arithmetic.thinning import Drops
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import config_rank
from lora_inject.variants import VARIANTS, Variant

_ROLES = {key: role for variant in VARIANTS.values() for role, key in variant.keys.items()}
# In files of several ages a module stands around the tensor, with the adapter's name or without.
_KEY = rf"(?:base_model\.model\.)?(.+)\.({'|'.join(_ROLES)})(?:(?:\.default)?\.weight)?"
Others = dict[str, dict[str, Tensor]]  # by the path in the file and by role


def without_others(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Others]:
    """The tensors of a file without those of variants, and these."""
    rest: dict[str, Tensor] = {}
    others: Others = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(_KEY, key)
        if match is None:
            rest[key] = tensor
        else:
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
                f"config asks for {sorted(variant.more) or 'nothing'}."
            )
        if own:
            _require_same_rows(pair)
        found.append(replace(pair, variant=variant.name, others=own))
    if left:
        raise FormatError(f"{where}: {next(iter(left))} has no A and B.")
    return found


def as_told(pairs: list[PairData], own: Mapping[str, Any], dropout: float) -> list[PairData]:
    """The pairs with what our metadata says of them; ``dropout`` where it says none."""
    dropouts, fixed, starts, drops = (
        own.get(k, {}) for k in ("dropout", "fixed", "start", "drops")
    )
    if not (dropout or dropouts or fixed or starts or drops):
        return pairs
    return [
        replace(
            p, dropout=dropouts.get(p.path, dropout), fixed=fixed.get(p.path, ""),
            start=starts.get(p.path, ""), drops=Drops(*drops.get(p.path, ())),
        )
        for p in pairs
    ]  # fmt: skip


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
    return VARIANTS[names.pop()].peft if names else {}


def _require_same_rows(pair: PairData) -> None:
    """Refuse what PEFT has no such variant for, or takes the length of other rows."""
    grouped = config_rank(pair) != pair.rank
    if grouped or pair.part or pair.form in ("experts", "other") or pair.weight != "weight":
        kind = "grouped" if grouped else "of a kind"
        raise FormatError(
            f"{pair.name} is {kind} where PEFT's {pair.variant} is not the same.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
