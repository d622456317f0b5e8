"""PEFT's ``lora_bias``: a bias inside of B, which is a change of the layer's own bias.

The layer adds ``s (B A x + beta)``, so that its bias is ``b + s beta``: read as one that trained.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData, is_usable

_KEY = r"(?:base_model\.model\.)?(.+)\.lora_B\.bias"
WORD = "lora_bias"


def without_lora_bias(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file without the biases of B, and these by the path in the file."""
    found = {key: re.fullmatch(_KEY, key) for key in tensors}
    rest = {key: tensors[key] for key, match in found.items() if match is None}
    return rest, {match[1]: tensors[key] for key, match in found.items() if match is not None}


def added_biases(
    betas: Mapping[str, Tensor], pairs: Iterable[PairData], config: Mapping[str, Any], where: object
) -> dict[str, Tensor]:
    """What is added to the biases of layers, by their names in the base.

    Raises:
        FormatError: some are missing or too many, or PEFT has no such bias.
    """
    layers = {pair.path: pair for pair in pairs}
    wanted = layers.keys() if config.get(WORD) else set[str]()
    if betas.keys() != wanted:
        odd = min(betas.keys() ^ wanted)
        raise FormatError(
            f"{where}: {WORD} is {bool(config.get(WORD))}, and {odd} has "
            f"{'a' if odd in betas else 'no'} bias of B."
        )
    for path, beta in betas.items():
        pair = layers[path]
        fits = pair.form in ("linear", "conv") and beta.shape == pair.B.shape[:1]
        if not (fits and is_usable(beta, floating=True)):
            raise FormatError(
                f"{where}: the bias of B of {path} is {tuple(beta.shape)}, {beta.dtype}."
            )
    return {f"{path}.bias": beta * layers[path].scaling for path, beta in betas.items()}
