"""The files of kohya's scripts, A1111 and ComfyUI: one safetensors file with flattened names.

``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``, ``.lora_up.weight`` and
``.alpha``. Dots and underscores are one in these names, so that only a model can tell them apart:
names are looked up among those of its modules, never taken to pieces.

Files of LyCORIS are of the same form, with tensors of other variants beside these or in place of
them: ``formats.lycoris``.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.core.paths import bare_modules
from lora_inject.errors import FormatError
from lora_inject.files.formats import lycoris
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
SUFFIXES = (".safetensors",)  # of its files
_DOWN, _UP, _MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
_LAST = (_DOWN, _UP, _MID, "alpha", "dora_scale", *lycoris.KEYS)


def module_key(prefix: str, path: str) -> str:
    """The flattened name of a module."""
    return f"{prefix}_{path.replace('.', '_')}"


def looks_like(path: Path) -> bool:
    """Whether it is a single safetensors file."""
    return path.is_file() and path.suffix in SUFFIXES


def read(path: Path, index: Index | None = None, alpha: float | None = None) -> AdapterData:
    """Read a file.

    Args:
        path: the file.
        index: the modules of the model that it is for; without one its names stay flattened.
        alpha: for layers without one in the file; None takes the rank, as the scripts do.

    Raises:
        FormatError: the file is not there or not whole, or a name is not, or not uniquely, one of
            the model's.
    """
    return _from_tensors(*read_tensors(path), path, index, alpha)


def from_state(state: AdapterState, index: Index | None, alpha: float | None) -> AdapterData:
    """The same without a file.

    Raises:
        FormatError: as ``read``.
    """
    return _from_tensors(state, state.metadata, IN_MEMORY, index, alpha)


def _from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    index: Index | None,
    alpha: float | None,
) -> AdapterData:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        if suffix not in _LAST:
            raise FormatError(f"{path}: the tensor {key} is of no kind that is supported.")
        layers.setdefault(name, {})[suffix] = tensor
    names = {name: [name] for name in layers} if index is None else _names(index)
    pairs, unknown, given = [], [], Given()
    for name, own in layers.items():
        found = names.get(name, [])
        if len(found) > 1:
            raise FormatError(f"{path}: {name} can be {found[0]} or {found[1]} of this model.")
        pair = _pair(found[0] if found else name, own, alpha, path)
        if not found:
            unknown.append(name)
            continue
        if not is_repeated_pair(given, pair.path, name, pair):
            pairs.append(pair)
    if unknown and index is not None:
        raise FormatError(
            f"{path}: {len(unknown):,} names are no modules of this {type(index.model).__name__}: "
            f"{', '.join(unknown[:3])}{', ...' if unknown[3:] else ''}."
        )
    facts = {"format": "kohya", "config": metadata, "flattened": index is None}
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
        name = module_key(prefix, pair.path)
        whole = pair.has_own_shapes or pair.form != "conv" or pair.A.shape[0] == pair.rank
        if pair.form not in ("linear", "conv") or not whole or pair.weight != "weight":
            raise FormatError(f"{pair.name}: kohya's format has no word for this kind of layer.")
        if f"{name}.alpha" in tensors:
            raise FormatError(f"{pair.name}: another module has the same flattened name, {name}.")
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _tensors(pair).items()}
    ranks = {pair.rank for pair in data.pairs}
    plain = all(pair.variant == "lora" for pair in data.pairs)
    metadata = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
    }
    return AdapterState(tensors, "kohya", {}, metadata)


def _tensors(pair: PairData) -> dict[str, Tensor]:
    """The tensors of a layer by what stands behind its name.

    Raises:
        FormatError: the format has no word for its variant.
    """
    if lycoris.is_whole(pair):  # which is added as it is, whatever alpha
        B = (pair.B.double() * pair.scaling).to(pair.B.dtype) if pair.scaling != 1 else pair.B
        pair = replace(pair, B=B, alpha=float(pair.rank), rule="lora")
    own = {"alpha": torch.tensor(pair.scaling * pair.rank)}
    own |= lycoris.tensors_of(pair) if lycoris.algorithm(pair) else {_DOWN: pair.A, _UP: pair.B}
    if pair.variant in ("dora", "dora_loha", "dora_lokr"):
        return {**own, "dora_scale": lycoris.scale_of(pair)}
    if pair.variant == "tucker":
        return {**own, _MID: pair.others["mid"]}
    if pair.variant not in ("lora", "loha", "lokr"):
        raise FormatError(
            f"{pair.name} is a {pair.variant}, which kohya's format is not written with.",
            remedy="torch.save(lora_state_dict(model), ...) keeps it for load_lora_state_dict.",
        )
    return own


def _names(index: Index) -> dict[str, list[str]]:
    """Every module's path by each flattened name that it can have."""
    names: dict[str, list[str]] = {}
    for path in bare_modules(index.by_path):
        for prefix in _ALL_PREFIXES if path else ():
            names.setdefault(module_key(prefix, path), []).append(path)
    return names


def _pair(path: str, own: Mapping[str, Tensor], alpha: float | None, where: Path) -> PairData:
    """The pair of a layer, of its tensors by what stands behind its name.

    Raises:
        FormatError: they are no adapter of a kind that is supported.
    """
    rest = dict(own)
    value, scale = rest.pop("alpha", None), rest.pop("dora_scale", None)
    if value is not None and value.numel() != 1:
        raise FormatError(f"{path}: alpha must be one number, not {tuple(value.shape)}.")
    if value is not None and value.item() != 0:  # the scripts read 0 as none
        alpha = value.item()
    if rest and rest.keys() <= {*lycoris.KEYS}:
        pair = lycoris.pair_of(path, rest, alpha, None, where)
        if lycoris.is_whole(pair):  # alpha is its rank then, and changes nothing
            r = int(alpha) if alpha and 1 <= alpha < 2**31 and alpha == int(alpha) else 1
            pair = replace(pair, r=r, alpha=float(r))
    elif {_DOWN, _UP} <= rest.keys() <= {_DOWN, _UP, _MID}:
        A, B, mid = rest[_DOWN], rest[_UP], rest.get(_MID)
        form: Form = "conv" if A.dim() > 2 else "linear"
        more = {} if mid is None else {"mid": mid}
        pair = PairData(path, A, B, alpha, form, variant="tucker" if more else "lora", others=more)
    else:
        raise FormatError(f"{where}: {path} has only {sorted(rest)} of what makes an adapter.")
    if scale is not None:
        if pair.variant == "tucker":
            raise FormatError(
                f"{where}: {path} is a DoRA of a tucker, which is not supported.",
                remedy="Merge it where it was made.",
            )
        pair = lycoris.with_magnitude(pair, scale, where)
    return pair if pair.alpha is not None else replace(pair, alpha=float(pair.rank))
