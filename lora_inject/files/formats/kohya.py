"""The files of kohya's scripts, A1111 and ComfyUI: one safetensors file with flattened names.

``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``, ``.lora_up.weight`` and
``.alpha``. Dots and underscores are one in these names, so that only a model can tell them apart:
``formats.image_names`` has the names that tools give its modules. The first files of diffusers are
read here too, which have other names for the same tensors.

Files of LyCORIS are of the same form, with tensors of other variants beside these or in place of
them: ``formats.lycoris``.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lora_inject.core.index import Index
from lora_inject.errors import FormatError, warn
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.fused import divided, joined
from lora_inject.files.formats.image_names import (
    OTHERS,
    Slot,
    family_of,
    flat_prefix,
)
from lora_inject.files.formats.image_parts import (
    UP,
    Choice,
    ModelNames,
    layers_of,
)
from lora_inject.files.formats.kohya_pairs import pair_of, tensors_of
from lora_inject.files.formats.one_place import Given, is_repeated_pair
from lora_inject.files.formats.pairs import whole_layers
from lora_inject.files.formats.state import IN_MEMORY, AdapterState
from lora_inject.files.formats.storage import (
    parse_json,
    read_tensors,
    replaced_together,
    write_tensors,
)
from lora_inject.printing import plural

SUFFIXES = (".safetensors",)  # of its files
METADATA = "lora_inject"  # the ranks of what is fused, by its name


def module_key(prefix: str, path: str) -> str:
    """The flattened name of a module."""
    return f"{prefix}_{path.replace('.', '_')}"


def looks_like(path: Path) -> bool:
    """Whether it is a single safetensors file."""
    return path.is_file() and path.suffix in SUFFIXES


def read(
    path: Path, index: Index | None = None, alpha: float | None = None, component: str = ""
) -> AdapterData:
    """Read a file.

    Args:
        path: the file.
        index: the modules of the model that it is for; without one its names stay flattened.
        alpha: for layers without one in the file; None takes the rank, as the scripts do.
        component: what the model is in its pipeline, where that is known.

    Raises:
        FormatError: the file is not there or not whole, or a name is not, or not uniquely, one of
            the model's.
    """
    return from_tensors(*read_tensors(path), path, index, alpha, component)


def from_state(state: AdapterState, index: Index | None, alpha: float | None) -> AdapterData:
    """The same without a file.

    Raises:
        FormatError: as ``read``.
    """
    return from_tensors(state, state.metadata, IN_MEMORY, index, alpha)


def from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: Path,
    index: Index | None,
    alpha: float | None,
    component: str = "",
) -> AdapterData:
    """What the tensors say; ``path`` is for errors."""
    layers, others = layers_of(tensors, path)
    names = None if index is None else ModelNames(index, component)
    choice = Choice({name: (Slot(name),) for name in layers})
    if names is not None and layers:
        ups = {name: own[UP] for name, own in layers.items() if UP in own}
        rows = {name: up.shape[0] for name, up in ups.items() if up.dim()}
        choice = names.choose(layers, rows, path)
    for key in others:
        if names is None or not layers or names.place(key).label in choice.labels:
            raise FormatError(f"{path}: the tensor {key} is of no kind that is supported.")
    pairs, given, ranks = [], Given(), _ranks(metadata, path)
    for name, slots in choice.slots.items():
        title = slots[0].path if len(slots) == 1 else name
        pair = pair_of(title, layers[name], alpha, path)
        for part in divided(pair, slots, names.sizes(slots) if names else [], ranks.get(name, ())):
            if not is_repeated_pair(given, part.path, name, part):
                pairs.append(part)
    facts = {"format": "kohya", "config": metadata, "flattened": index is None}
    return AdapterData(tuple(pairs), facts=facts, left=choice.left)


def _ranks(metadata: Mapping[str, str], path: Path) -> dict[str, list[int]]:
    """The ranks of what is fused, where we have written it."""
    own = parse_json(metadata.get(METADATA, "{}"), f"the metadata of {path}")
    for ranks in own.values():
        if not isinstance(ranks, list) or not all(isinstance(r, int) and r >= 0 for r in ranks):
            raise FormatError(f"{path}: the ranks in its metadata cannot be read.")
    return own


def write(data: AdapterData, path: Path) -> None:
    """Write a file.

    Raises:
        FormatError: the adapter holds what the format has no word for, two modules have one
            flattened name, or the file cannot be written.
    """
    write_all([data], path)


def write_all(parts: Iterable[AdapterData], path: Path) -> None:
    """Write the adapters of the components of a pipeline into one file.

    Raises:
        FormatError: as ``write``.
    """
    states = [to_state(data) for data in parts]
    names = Counter(key for state in states for key in state)
    if twice := [key for key, n in names.items() if n > 1]:
        raise FormatError(f"two components have one name in kohya's format, such as {twice[0]}.")
    dims = {state.metadata["ss_network_dim"] for state in states}
    modules = {state.metadata["ss_network_module"] for state in states}
    metadata = {key: value for state in states for key, value in state.metadata.items()}
    metadata |= {
        "ss_network_module": min(modules),  # LyCORIS's before the scripts' own
        "ss_network_dim": dims.pop() if len(dims) == 1 else "Dynamic",
    }
    with replaced_together(path) as (file,):
        write_tensors({k: t for state in states for k, t in state.items()}, file, metadata)


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
    tensors: dict[str, Tensor] = {}
    fused: dict[str, list[int]] = {}
    for name, pair, ranks in _named(data):
        if f"{name}.alpha" in tensors:
            raise FormatError(f"{pair.name}: another module has the same flattened name, {name}.")
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors_of(pair).items()}
        fused |= {name: ranks} if len(ranks) > 1 else {}
    if any(pair.variant.startswith("dora") for pair in data.pairs):
        warn(
            "LyCORIS alone computes a DoRA of rows as it was trained: ComfyUI divides by the "
            "lengths of the base's rows, A1111 by those of columns, and diffusers leaves them out. "
            "A plain LoRA near to it is what all of them read: portable=True, r=16, error=0.1."
        )
    dims = {pair.rank for pair in data.pairs}
    plain = all(pair.variant == "lora" for pair in data.pairs)
    metadata = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(max(dims)) if len(dims) == 1 else "Dynamic",
        **({METADATA: json.dumps(fused)} if fused else {}),
    }
    return AdapterState(tensors, "kohya", {}, metadata)


def _named(data: AdapterData) -> Iterable[tuple[str, PairData, list[int]]]:
    """Each layer by the name that tools know, and the ranks of ours that are fused in it.

    What cannot be said of a fused one has LyCORIS's names, part by part.
    """
    pairs = {pair.path: _checked(pair) for pair in whole_layers(data.pairs)}
    family, sizes = family_of(data.model_class), data.modules or dict.fromkeys(pairs, 0)
    prefix = flat_prefix(data.component, data.encoders, family)
    for name, slots in family.written({**sizes, **dict.fromkeys(pairs, 0)}).items():
        there = {slot.path: pairs[slot.path] for slot in slots if slot.path in pairs}
        if not there:
            continue
        whole = joined(there, slots, [sizes.get(slot.path, 0) for slot in slots])
        if whole is not None:
            ranks = [there[slot.path].rank if slot.path in there else 0 for slot in slots]
            yield module_key(prefix, name), whole, ranks
            pairs = {path: pair for path, pair in pairs.items() if path not in there}
    if pairs and family is not OTHERS:
        warn(
            f"{plural(len(pairs), 'layer')} such as {next(iter(pairs))} are written by LyCORIS's "
            "names, which ComfyUI reads and kohya's scripts do not: theirs are fused with others."
        )
    for path, pair in pairs.items():
        yield module_key(OTHERS.flat, path), pair, []


def _checked(pair: PairData) -> PairData:
    """A pair that the format has words for.

    Raises:
        FormatError: it has none.
    """
    whole = pair.has_own_shapes or pair.form != "conv" or pair.A.shape[0] == pair.rank
    if pair.form not in ("linear", "conv") or not whole or pair.weight != "weight" or not pair.path:
        raise FormatError(f"{pair.name}: kohya's format has no word for this kind of layer.")
    return pair
