"""LoHa, LoKr and Tucker by the names that LyCORIS and PEFT have for their tensors in files.

Both call them the same (``hada_w1_a``, ``lokr_w2``), and lay them out the same: what differs is the
factor of a LoKr of which both matrices are whole, and is the business of each format.

A DoRA's ``dora_scale`` may stand beside these, and beside the A and B of kohya's files: (out, 1,
..), the lengths of rows, or in older files (1, in, 1, ..), those of columns.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData

_LOHA = {
    "hada_w1_a": "B", "hada_w1_b": "A", "hada_w2_a": "B2", "hada_w2_b": "A2",
    "hada_t1": "mid", "hada_t2": "mid2",
}  # fmt: skip
_LOKR = {
    "lokr_w1": "B", "lokr_w1_a": "B", "lokr_w1_b": "B2",
    "lokr_w2": "A", "lokr_w2_a": "A2", "lokr_w2_b": "A", "lokr_t2": "mid",
}  # fmt: skip
_NAMES = {"loha": _LOHA, "lokr": _LOKR}
KEYS = (*_LOHA, *_LOKR)
# What an adapter consists of, and of what it may besides.
_SETS = {
    "loha": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "lokr": [
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ],
}
_CORES = {"loha": {"hada_t1", "hada_t2"}, "lokr": {"lokr_t2"}}
# With a core, what stands on the side of the outputs is (r, out) in files.
_TURNED = {"loha": ("B", "B2"), "lokr": ("A2",)}


def pair_of(
    path: str, own: Mapping[str, Tensor], alpha: float | None, r: int | None, where: object
) -> PairData:
    """The pair that the tensors of a layer are.

    Args:
        path: the layer.
        own: its tensors by their names in the file.
        alpha: of the file; None where it does not say.
        r: the rank, where the file says it.
        where: the file, for errors.

    Raises:
        FormatError: they are not those of a LoHa or a LoKr.
    """
    variant = next(name for name, names in _NAMES.items() if next(iter(own)) in names)
    cores = own.keys() & _CORES[variant]
    whole = "lokr_w2" in own
    if own.keys() - cores not in _SETS[variant] or (cores and (cores != _CORES[variant] or whole)):
        raise FormatError(f"{where}: {path} has {sorted(own)}, which is no {variant}.")
    if any(tensor.dim() < 2 for tensor in own.values()):
        raise FormatError(f"{where}: {path} has tensors of fewer than two dimensions.")
    tensors = {_NAMES[variant][key]: tensor for key, tensor in own.items()}
    if cores:
        tensors |= {role: tensors[role].mT for role in _TURNED[variant]}
    told = _rank(variant, tensors)
    if r is not None and told not in (None, r):
        raise FormatError(f"{where} gives {path} the rank {r}, and its tensors have {told}.")
    others = {role: tensor for role, tensor in tensors.items() if role not in ("A", "B")}
    return PairData(
        path, tensors["A"], tensors["B"], alpha, variant=variant, others=others, r=told or r or 0
    )


def _rank(variant: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank that tensors tell; a LoKr of whole matrices has none."""
    if variant == "loha" or "A2" in tensors:
        return int(tensors["A"].shape[0])
    return int(tensors["B2"].shape[0]) if "B2" in tensors else None


def algorithm(pair: PairData) -> str:
    """Which of both a pair is, or is a DoRA of, "loha" or "lokr"; else ""."""
    name = pair.variant.rpartition("_")[2]
    return name if name in _NAMES else ""


def tensors_of(pair: PairData) -> dict[str, Tensor]:
    """The tensors of a LoHa or LoKr by their names in files, without a magnitude."""
    tensors, name = pair.tensors, algorithm(pair)
    if "mid" in tensors:
        tensors |= {role: tensors[role].mT for role in _TURNED[name]}
    names = dict(_NAMES[name])
    if name == "lokr":
        for role, one, several in (("B2", "lokr_w1", "lokr_w1_a"), ("A2", "lokr_w2", "lokr_w2_b")):
            del names[one if role in tensors else several]
    return {key: tensors[role].contiguous() for key, role in names.items() if role in tensors}


def is_whole(pair: PairData) -> bool:
    """Whether it is a LoKr of two whole matrices, which LyCORIS adds as they are."""
    return algorithm(pair) == "lokr" and not pair.others.keys() - {"magnitude"}


def with_magnitude(pair: PairData, scale: Tensor, where: object) -> PairData:
    """The DoRA that a ``dora_scale`` makes of a pair.

    Raises:
        FormatError: it is neither of rows nor of columns, or nothing tells of which.
    """
    (n_out, n_in), shape = _features(pair), tuple(scale.shape)
    flat = len(shape) == 1 and shape[0] in (n_out, n_in)
    if flat and n_out == n_in:
        raise FormatError(
            f"{where}: dora_scale of {pair.name} is {shape}, and nothing tells whether of rows or "
            "of columns.",
            remedy=f"Reshape it to ({n_out}, 1) for rows or (1, {n_in}) for columns.",
        )
    # Factors hold a kernel's columns with those of its features.
    with_kernel = len(shape) > 2 and algorithm(pair) and n_in % shape[1] == 0
    if shape[:1] == (n_out,) and scale.numel() == n_out:
        by = "dora"
    elif flat or (scale.numel() == shape[1] and (shape[1] == n_in or with_kernel)):
        by = "dora_columns"
    else:
        raise FormatError(
            f"{where}: dora_scale of {pair.name} is {shape}, where {n_out} features go out and "
            f"{n_in} come in."
        )
    name = algorithm(pair)
    others = {**pair.others, "magnitude": scale.flatten()}
    return replace(pair, variant=f"{by}_{name}" if name else by, others=others)


def _features(pair: PairData) -> tuple[int, int]:
    """How many features go out, and how many come in, without a kernel."""
    own = pair.tensors
    if algorithm(pair) != "lokr":
        return own["B"].shape[0], own["A"].shape[1]
    first, second = own["B"], own.get("A2", own["A"])
    columns = own.get("B2", first).shape[1] * own["A"].shape[1]
    return first.shape[0] * second.shape[0], columns


def scale_of(pair: PairData) -> Tensor:
    """A DoRA's magnitude as ``dora_scale``: (out, 1, ..)."""
    kernel = len(pair.kernel) or pair.A.dim() - 2
    return pair.others["magnitude"].reshape(-1, *(1,) * (kernel + 1))
