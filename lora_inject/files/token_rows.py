"""Rows for new tokens: resizing a vocabulary draws them, and no file of an adapter holds them.

Frozen, they are part of a base that nobody has saved. So the layers that have a row for each token
are among what an adapter was trained over: their fingerprint goes with it, and loading warns where
they are others. Where the checkpoint is at hand, saving warns already.
"""

from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from lora_inject.compat.marks import resizable_embeddings, rows_of_checkpoint
from lora_inject.core.look import Look
from lora_inject.errors import warn

_REMEDY = (
    "Rows of new tokens are drawn anew by each resizing and are in no file of an adapter, unless "
    "it trains them (train_also={!r}, or freeze(model, train_also=...) before saving); else save "
    "the resized base."
)


def token_tables(
    look: Look, paths: Mapping[nn.Module, str], held: Container[str]
) -> dict[str, Tensor]:
    """The weights with a row for each token, each once, by their names in the bare model.

    Args:
        look: the model.
        paths: of its modules in the bare model.
        held: the names of what is left out.
    """
    found: dict[str, Tensor] = {}
    for module in look.index.modules:
        for layer, weight in resizable_embeddings(module).items():
            if layer in paths and not any(weight is known for known in found.values()):
                found[f"{paths[layer]}.weight"] = weight
    return {key: weight for key, weight in found.items() if key not in held}


def warn_of_unsaved_rows(look: Look, paths: Mapping[nn.Module, str], held: Container[str]) -> None:
    """Warn where a vocabulary has been resized since the checkpoint, and the rows are not saved.

    Args:
        look: the model.
        paths: of its modules in the bare model.
        held: the names of what the file holds.
    """
    known = [rows for m in look.index.modules if resizable_embeddings(m)
             if (rows := rows_of_checkpoint(m)) is not None]  # fmt: skip
    new = [
        key
        for key, weight in token_tables(look, paths, held).items()
        if known and weight.shape[0] > known[0]
    ]
    if new:
        names = [key.removesuffix(".weight") for key in new]
        warn(
            f"the vocabulary was resized from {known[0]:,} rows, and the new rows of "
            f"{', '.join(names)} are not in the file. " + _REMEDY.format(names)
        )


def warn_of_other_rows(saved: Mapping[str, Any], here: Mapping[str, tuple[Tensor, str]]) -> None:
    """Warn of layers whose rows for tokens are not those that an adapter was trained over.

    Args:
        saved: the fingerprints, by name.
        here: the weights of the model that differ, and how.
    """
    for key, (weight, _) in here.items():
        rows, now = saved[key].get("shape", [0])[0], weight.shape[0]
        told = f"it has {now:,} rows, and had {rows:,}" if rows != now else "its values differ"
        first = f"Call resize_token_embeddings({rows}) first, as then. " if rows != now else ""
        warn(
            f"{key} is not what the adapter was trained over: {told}. {first}"
            + _REMEDY.format([key.removesuffix(".weight")])
        )
