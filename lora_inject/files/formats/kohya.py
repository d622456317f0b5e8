"""The files of kohya's scripts, A1111 and ComfyUI: one safetensors file with flattened names.

``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``, ``.lora_up.weight`` and
``.alpha``. Dots and underscores are one in these names, so that only a model can tell them apart:
names are looked up among those of its modules, never taken to pieces.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.one_place import Given, is_repeated_pair
from lora_inject.files.formats.pairs import whole_layers
from lora_inject.files.formats.state import IN_MEMORY, AdapterState
from lora_inject.files.formats.storage import read_tensors, replaced_together, write_tensors
from lora_inject.kinds.base import Form

# What stands before a module's name, by the class of the model; the scripts know these.
PREFIXES = {
    "UNet": "lora_unet",
    "TextModel": "lora_te",
    "Transformer": "lora_transformer",
    "": "lycoris",
}
_ALL_PREFIXES = ("lora_unet", "lora_te1", "lora_te2", "lora_te", "lora_transformer", "lycoris")
_SUFFIXES = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}


def module_key(prefix: str, path: str) -> str:
    """The flattened name of a module."""
    return f"{prefix}_{path.replace('.', '_')}"


def looks_like(path: Path) -> bool:
    """Whether it is a single safetensors file."""
    return path.is_file() and path.suffix == ".safetensors"


def read(path: Path, model: nn.Module | None = None, alpha: float | None = None) -> AdapterData:
    """Read a file.

    Args:
        path: the file.
        model: the model that it is for; without one its names stay flattened.
        alpha: for layers without one in the file; None takes the rank, as the scripts do.

    Raises:
        FormatError: the file is not there or not whole, or a name is not, or not uniquely, one of
            the model's.
    """
    return _from_tensors(*read_tensors(path), path, model, alpha)


def from_state(state: AdapterState, model: nn.Module | None, alpha: float | None) -> AdapterData:
    """The same without a file.

    Raises:
        FormatError: as ``read``.
    """
    return _from_tensors(state, state.metadata, IN_MEMORY, model, alpha)


def _from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    model: nn.Module | None,
    alpha: float | None,
) -> AdapterData:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        if suffix not in _SUFFIXES:
            raise FormatError(f"{path}: the tensor {key} is of no kind that is supported.")
        layers.setdefault(name, {})[_SUFFIXES[suffix]] = tensor
    names = {name: [name] for name in layers} if model is None else _names(model)
    pairs, unknown, given = [], [], Given()
    for name, own in layers.items():
        found = names.get(name, [])
        if len(found) > 1:
            raise FormatError(f"{path}: {name} can be {found[0]} or {found[1]} of this model.")
        if not {"A", "B"} <= own.keys():
            raise FormatError(f"{path}: {name} has only one of lora_down and lora_up.")
        if not found:
            unknown.append(name)
            continue
        pair = _pair(found[0], own, alpha)
        if not is_repeated_pair(given, pair.path, name, pair):
            pairs.append(pair)
    if unknown:
        raise FormatError(
            f"{path}: {len(unknown):,} names are no modules of this {type(model).__name__}: "
            f"{', '.join(unknown[:3])}{', ...' if unknown[3:] else ''}."
        )
    facts = {"format": "kohya", "config": metadata, "flattened": model is None}
    return AdapterData(tuple(pairs), facts=facts)


def write(data: AdapterData, path: Path) -> None:
    """Write a file.

    Raises:
        FormatError: the adapter holds what the format has no word for, two modules have one
            flattened name, or the file cannot be written.
    """
    state = to_state(data)
    with replaced_together(path) as (file,):
        write_tensors(state, file, state.metadata)


def to_state(data: AdapterData) -> AdapterState:
    """The same without a file.

    Raises:
        FormatError: as ``write``.
    """
    if data.tensors:
        raise FormatError(
            f"kohya's format holds A and B alone, and {next(iter(data.tensors))} was trained too.",
            remedy='Save it as "peft".',
        )
    data.require_no_rows("kohya's format")
    prefix = next(value for part, value in PREFIXES.items() if part in data.model_class)
    tensors: dict[str, Tensor] = {}
    for pair in whole_layers(data.pairs):
        pair.require_plain("kohya's format")
        name = module_key(prefix, pair.path)
        grouped = pair.form == "conv" and pair.A.shape[0] != pair.rank
        if pair.form not in ("linear", "conv") or grouped or pair.weight != "weight":
            raise FormatError(f"{pair.name}: kohya's format has no word for this kind of layer.")
        if f"{name}.alpha" in tensors:
            raise FormatError(f"{pair.name}: another module has the same flattened name, {name}.")
        scale = torch.tensor(pair.scaling * pair.rank)
        tensors |= {
            f"{name}.lora_down.weight": pair.A,
            f"{name}.lora_up.weight": pair.B,
            f"{name}.alpha": scale,
        }
    ranks = {pair.rank for pair in data.pairs}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
    }
    return AdapterState(tensors, "kohya", {}, metadata)


def _names(model: nn.Module) -> dict[str, list[str]]:
    """Every module's path by each flattened name that it can have."""
    names: dict[str, list[str]] = {}
    for path in bare_modules(Index(model).by_path):
        for prefix in _ALL_PREFIXES if path else ():
            names.setdefault(module_key(prefix, path), []).append(path)
    return names


def _pair(path: str, own: dict[str, Tensor], alpha: float | None) -> PairData:
    A, B = own["A"], own["B"]
    form: Form = "conv" if A.dim() > 2 else "linear"
    value = own.get("alpha")
    if value is not None and value.numel() != 1:
        raise FormatError(f"{path}: alpha must be one number, not {tuple(value.shape)}.")
    if value is not None and value.item() != 0:  # the scripts read 0 as none
        alpha = value.item()
    rank = B.shape[1] if B.dim() > 1 else 1
    return PairData(path, A, B, float(rank) if alpha is None else alpha, form)
