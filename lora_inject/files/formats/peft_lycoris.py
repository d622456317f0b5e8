"""PEFT's LoHa and LoKr: ``peft_type`` LOHA and LOKR, and the tensors of ``formats.lycoris``.

Their scaling is alpha / r in any case. PEFT decides by the rank and two settings which factors of a
LoKr are whole; what it would make otherwise than it is here cannot be written. A core of a kernel
of one dimension has a second one of 1.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError, warn
from lora_inject.files.formats import lycoris
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.peft_config import (
    CONFIG,
    Scalings,
    as_said,
    own_metadata,
    with_numbers,
)
from lora_inject.files.formats.peft_keys import PREFIX
from lora_inject.files.formats.peft_targets import target_names
from lora_inject.files.formats.peft_written import pattern_of, still_said, to_metadata
from lora_inject.variants.lokr import LoKr
from lora_inject.variants.matrices import Sizes

TYPES = {"LOHA": "loha", "LOKR": "lokr"}
_KEY = rf"(?:base_model\.model\.)?(.+)\.({'|'.join(lycoris.KEYS)})"
# Keys of the config that say nothing that the tensors do not, or nothing of them.
_HARMLESS = {
    "alpha", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "decompose_both",
    "decompose_factor", "exclude_modules", "inference_mode", "init_weights", "layers_pattern",
    "layers_to_transform", "module_dropout", "modules_to_save", "peft_type", "peft_version", "r",
    "rank_dropout", "rank_dropout_scale", "rank_pattern", "revision", "target_modules", "task_type",
    "use_effective_conv2d",
}  # fmt: skip
_DROPOUTS = ("rank_dropout", "module_dropout")


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    index: Index | None,
    alpha: float | None,
) -> AdapterData:
    """What PEFT's config and tensors say; ``path`` is for errors.

    Raises:
        FormatError: they say what cannot be honoured.
    """
    file, variant = path / CONFIG, TYPES[config["peft_type"]]
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise FormatError(
                f"{file}: {key}={value!r} is not supported.",
                remedy=f"Where it says nothing of the tensors, remove {key} from the file.",
            )
    if config.get("modules_to_save"):
        raise FormatError(f"{file}: modules_to_save beside a {variant} is not supported.")
    config_of_lora = _as_of_lora(config)
    own = own_metadata(config_of_lora, metadata, path)
    scalings, layers = Scalings(config_of_lora, alpha, file), _by_layer(tensors, index, path)
    pairs = tuple(_pair(name, own, scalings, variant, path) for name, own in layers.items())
    for key in _DROPOUTS:
        if config.get(key):
            warn(f"{file}: {key}={config[key]!r} acts in training alone, and is left out.")
    return AdapterData(
        pairs,
        facts={"format": "PEFT", "config": config},
        **as_said(config, own),
    )


def _by_layer(
    tensors: Mapping[str, Tensor], index: Index | None, path: Path
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by their names, with kernels as the model's layers have them."""
    modules = {} if index is None else bare_modules(index.by_path)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(_KEY, key)
        if match is None:
            raise FormatError(f"{path}: the tensor {key} is of no kind that is supported.")
        if tensor.dim() == 4 and isinstance(modules.get(match[1]), nn.Conv1d):
            tensor = tensor.squeeze(-1)
        layers.setdefault(match[1], {})[match[2]] = tensor
    return layers


def _as_of_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with alpha by the name that it has in one of LoRA."""
    alpha = {"lora_alpha": config["alpha"]} if "alpha" in config else {}
    return with_numbers({**config, **alpha})


def _pair(
    name: str, own: Mapping[str, Tensor], scalings: Scalings, variant: str, path: Path
) -> PairData:
    r = scalings.rank_of(name)
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise FormatError(f"{path / CONFIG} gives {name} the rank {r!r}.")
    pair = lycoris.pair_of(name, own, scalings.alpha_of(name, r), r, path)
    if pair.variant != variant:
        raise FormatError(f"{path}: {name} is a {pair.variant}, and its config one of {variant}.")
    _require_same_arrangement(pair)
    return pair


def _require_same_arrangement(pair: PairData) -> None:
    """Refuse the kernel of one dimension of which PEFT's product is another (seen in 0.21)."""
    of_kernel = pair.others.get("mid", pair.A)
    if pair.variant == "lokr" and of_kernel.dim() == 3:
        raise FormatError(
            f"{pair.name}: PEFT's Kronecker product with a whole lokr_w2, or a core, is in another "
            "order for a kernel of one dimension, or fails.",
            remedy="Use kohya's format for it, or a smaller r.",
        )


def is_one(data: AdapterData) -> bool:
    """Whether an adapter is one that PEFT has a type of its own for."""
    return any(pair.variant in TYPES.values() for pair in data.pairs)


def to_tensors(data: AdapterData) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """PEFT's config, its tensors, and the metadata that is ours.

    Raises:
        FormatError: PEFT has no such adapter.
    """
    variants = {pair.variant for pair in data.pairs}
    if len(variants) > 1:
        raise FormatError(f"PEFT has one variant for all layers, and here are {sorted(variants)}.")
    if data.tensors:
        raise FormatError(
            f"PEFT's {variants.pop()} holds its factors alone, and {next(iter(data.tensors))} was "
            "trained too.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
    for pair in data.pairs:
        _require_known_layer(pair)
        _require_same_arrangement(pair)
    config = _config(data, variants.pop())
    tensors = {
        f"{PREFIX}{pair.path}.{key}": tensor.unsqueeze(-1) if tensor.dim() == 3 else tensor
        for pair in data.pairs
        for key, tensor in lycoris.tensors_of(pair).items()
    }
    said = {**_as_of_lora(config), "lora_dropout": 0.0}
    return config, tensors, json.dumps(to_metadata(data, data.pairs, said))


def _require_known_layer(pair: PairData) -> None:
    """Refuse what PEFT has no such adapter for."""
    plain = pair.weight == "weight" and not pair.part and pair.layout != "in_out" and pair.path
    if pair.form not in ("linear", "conv") or not plain or len(pair.kernel) > 2:
        raise FormatError(
            f"{pair.name or 'the model itself'} is of a kind for which PEFT has no {pair.variant}.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )


def _config(data: AdapterData, variant: str) -> dict[str, Any]:
    pairs = data.pairs
    ranks = {pair.path: pair.rank for pair in pairs}
    alphas = {pair.path: pair.scaling * pair.rank for pair in pairs}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    cores = {"mid" in pair.others for pair in pairs if _could_have_core(pair)}
    if len(cores) > 1:
        raise FormatError("PEFT has cores (Tucker) in all kernels or in none, and here in some.")
    return {
        "peft_type": next(name for name, own in TYPES.items() if own == variant),
        "task_type": data.task or None,
        "base_model_name_or_path": data.base_name or None,
        "r": r,
        "alpha": alpha,
        "rank_pattern": pattern_of({k: v for k, v in ranks.items() if v != r}, ranks),
        "alpha_pattern": pattern_of({k: v for k, v in alphas.items() if v != alpha}, alphas),
        "target_modules": target_names([pair.path for pair in pairs], data.modules),
        "use_effective_conv2d": cores == {True},
        "init_weights": True,
        "inference_mode": True,
        **(_division(pairs) if variant == "lokr" else {}),
        **still_said(data),
    }


def _could_have_core(pair: PairData) -> bool:
    """Whether PEFT would ask its setting of cores about a layer."""
    return max(pair.kernel, default=1) > 1 and (pair.variant == "loha" or "A2" in pair.others)


def _division(pairs: Iterable[PairData]) -> dict[str, Any]:
    """The settings with which PEFT divides all weights as these are.

    Raises:
        FormatError: there are none.
    """
    wanted = {pair.path: (*_sizes(pair), pair.rank) for pair in pairs}
    sizes = {n for given, _, _ in wanted.values() for n in (given.rows, given.columns)}
    for factor in (-1, *sorted(sizes)):
        for both in (False, True):
            rule = LoKr(factor=factor, both=both)
            if all(
                rule.factors(size, r) == given._replace(core=False)
                for given, size, r in wanted.values()
            ):
                return {"decompose_factor": factor, "decompose_both": both}
    raise FormatError(
        f"PEFT would divide {', '.join(list(wanted)[:3])} otherwise than they are divided here.",
        remedy='Save it as "kohya".',
    )


def _sizes(pair: PairData) -> tuple[Any, Sizes]:
    """How a LoKr divides its weight, and the sizes of that."""
    given = LoKr.of(pair.tensors).given
    assert given is not None
    rows = given.rows * int(pair.tensors.get("A2", pair.A).shape[0])
    size = Sizes((), rows, 1, pair.kernel)
    inner = int(pair.A.shape[1]) // (size.columns if given.second and not given.core else 1)
    return given, size._replace(channels=given.columns * inner)
