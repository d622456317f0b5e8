"""Adapters by the names of a model's checkpoint, and back: experts apart, modules by older names.

Transformers 5 fuses the experts of a layer into one tensor. Their checkpoints, and with them vLLM,
SGLang, llama.cpp and adapters made under transformers 4, have each expert apart.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.compat.conversions import (
    in_checkpoint,
    is_converted,
    names_in_checkpoint,
    names_in_model,
)
from lora_inject.core.paths import bare_key
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.one_place import Given, is_repeated_pair
from lora_inject.files.packed import fused_weights
from lora_inject.variants import SCALINGS

_END = ".weight"
_WIDTH = 2  # of rows that stand for a weight's: what is 1 wide some versions squeeze away


class Piece(NamedTuple):
    """A weight of the checkpoint that is a part of a fused one in the model.

    Attributes:
        path: its module's path in the checkpoint.
        expert: which expert it is of.
        rows: which rows of that expert's matrix it is.
    """

    path: str
    expert: int
    rows: Tensor


def as_in_checkpoint(
    data: AdapterData, model: nn.Module, modules: Mapping[str, nn.Module]
) -> AdapterData:
    """The same updates by the names of the checkpoint, with a pair for each expert.

    Of a model whose checkpoint has the same names and the same tensors, the adapter as it is.

    Args:
        data: an adapter by the names of the model.
        model: the model, without wrappers.
        modules: its modules by path.
    """
    if not is_converted(model):
        return data
    pieces = _pieces(model, _fused(modules))
    names = _Names(model, modules)
    pairs: list[PairData] = []
    for pair in data.pairs:
        own = pieces.get(f"{pair.path}.{pair.weight}") if pair.form == "experts" else None
        if own:
            pair.require_plain("a pair for each expert", "Give r=16, error=0.1 too.")
            pairs += [_of_expert(pair, piece) for piece in own]
        elif pieces and pair.form == "experts" and pair.weight == "weight" and pair.A.dim() == 2:
            pairs.append(replace(pair, path=names.of(pair.path), form="linear"))  # a router
        else:
            pairs.append(replace(pair, path=names.of(pair.path)))
    known = {names.of(path): size for path, size in (data.modules or {}).items()}
    known |= {piece.path: len(piece.rows) for own in pieces.values() for piece in own}
    return replace(
        data,
        pairs=tuple(pairs),
        tensors={names.of_tensor(name): tensor for name, tensor in data.tensors.items()},
        train_also=tuple(map(names.of, data.train_also)),
        modules=None if data.modules is None else known,
    )


def differs_in_checkpoint(
    pairs: Sequence[PairData], model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[str, str] | None:
    """A pair that a checkpoint has by another name or in several, and the first of its names.

    Of fused experts and of matrices the first stands for all.
    """
    if not pairs or not is_converted(model):
        return None
    for pair in {pair.A.dim(): pair for pair in reversed(pairs)}.values():
        pieces = _pieces(model, _fused({pair.path: modules[pair.path]}))
        own = pieces.get(f"{pair.path}.{pair.weight}")
        other = own[0].path if own else _Names(model, [pair.path]).of(pair.path)
        if other != pair.path:
            return pair.name, other
    return None


def as_in_model(
    data: AdapterData, model: nn.Module, modules: Mapping[str, nn.Module]
) -> AdapterData:
    """The same by the names of the model, where the file has those of its checkpoint.

    What the model has by the file's name stays, and what it has by neither.

    Args:
        data: what a file holds.
        model: the model, without wrappers.
        modules: its modules by path.

    Raises:
        FormatError: what a file has for experts is no LoRA of one weight.
    """
    paths = {pair.path: bare_key(pair.path, modules) for pair in data.pairs}
    owners = {name: bare_key(name.rpartition(".")[0], modules) for name in data.tensors}
    unknown = [path for path in paths.values() if path not in modules]
    others = [name for name, owner in owners.items() if owner not in modules]
    if not (unknown or others):
        return data
    known = names_in_model(model, [*(path + _END for path in unknown), *others])
    fused = {n: W for n, W in _fused(modules).items() if n in {known[p + _END] for p in unknown}}
    pieces = _pieces(model, fused)
    apart = {piece.path for own in pieces.values() for piece in own}
    seen, given = Given(), dict[str, PairData]()
    for pair in data.pairs:
        path = paths[pair.path]
        if path in apart and not is_repeated_pair(seen, path, pair.name, pair):
            given[path] = pair

    def renamed(pair: PairData) -> PairData:
        own = paths[pair.path]
        path = known.get(own + _END, own).removesuffix(_END)
        return replace(pair, path=path) if own not in modules and path in modules else pair

    plain = [renamed(pair) for pair in data.pairs if paths[pair.path] not in given]
    whole = [
        _of_all_experts(name, W, pieces[name], given)
        for name, W in fused.items()  # in the order of the parameters, by which PEFT names them
        if any(piece.path in given for piece in pieces.get(name, ()))
    ]
    there = {n for n in others if known[n].rpartition(".")[0] in modules}
    tensors = {known[n] if n in there else n: tensor for n, tensor in data.tensors.items()}
    return replace(data, pairs=(*plain, *whole), tensors=tensors)


class _Names:
    """What the checkpoint calls the modules of a model."""

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        self._known = names_in_checkpoint(model, [path + _END for path in modules if path])

    def of(self, path: str) -> str:
        return self._known.get(path + _END, path).removesuffix(_END)

    def of_tensor(self, name: str) -> str:
        owner, _, last = name.rpartition(".")
        return f"{self.of(owner)}.{last}".lstrip(".")


def _fused(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of experts that stand as one (E, out, in)."""
    return {
        f"{path}.{name}": fused.W
        for path, module in modules.items()
        for name, fused in fused_weights(module).items()
        if tuple(fused.W.shape[1:]) == (fused.n_out, fused.n_in)
    }


def _pieces(model: nn.Module, fused: Mapping[str, Tensor]) -> dict[str, list[Piece]]:
    """What the checkpoint has apart, by the fused weight and in the order of rows.

    Every row gets a number, and the numbers that come out tell which rows a piece is made of.
    """
    names, starts, numbers, first = list(fused), [], {}, 0
    for name, W in fused.items():
        starts.append(first)
        end = first + W.shape[0] * W.shape[1]
        numbers[name] = torch.arange(first, end).reshape(*W.shape[:2], 1).repeat(1, 1, _WIDTH)
        first = end
    found: dict[str, list[Piece]] = {}
    for key, own in in_checkpoint(model, numbers).items():
        if own.dim() != 2 or own.shape[1] != _WIDTH or not key.endswith(_END):
            continue  # as it is in the model, or the other way round
        i = bisect_right(starts, int(own[0, 0])) - 1
        at, size = own[:, 0] - starts[i], fused[names[i]].shape[1]
        expert = int(at[0]) // size
        if bool((at // size == expert).all()):
            piece = Piece(key.removesuffix(_END), expert, at % size)
            found.setdefault(names[i], []).append(piece)
    for own_pieces in found.values():
        own_pieces.sort(key=lambda piece: (piece.expert, int(piece.rows[0])))
    return found


def _of_expert(pair: PairData, piece: Piece) -> PairData:
    A, B = pair.A[piece.expert], pair.B[piece.expert][piece.rows.to(pair.B.device)]
    return replace(pair, path=piece.path, A=A, B=B, form="linear", weight="weight", layout="")


def _of_all_experts(
    name: str, W: Tensor, pieces: Iterable[Piece], given: Mapping[str, PairData]
) -> PairData:
    """The pair of a fused weight; of pieces that the file does not have, nothing is changed.

    Where gate and up share their A, as a fused pair that was taken apart, the rank is theirs; else
    they stand side by side.
    """
    experts: list[list[Piece]] = [[] for _ in range(W.shape[0])]
    for piece in pieces:
        experts[piece.expert].append(piece)
    pairs = [given[piece.path] for own in experts for piece in own if piece.path in given]
    for pair in pairs:
        pair.require_plain("one weight of all experts", "Load it with PEFT, and merge it there.")
        if pair.start or pair.form != "linear" or pair.A.shape[1] != W.shape[2]:
            raise FormatError(f"{pair.name} is no LoRA of a {tuple(W.shape)} weight of experts.")
    scaling = pairs[0].scaling if len({pair.scaling for pair in pairs}) == 1 else 1.0
    r = max(pair.rank for pair in pairs)
    shares = all(_share(own, given) for own in experts)
    n = 1 if shares else max(map(len, experts))
    dtype = torch.promote_types(pairs[0].A.dtype, pairs[0].B.dtype)
    A = torch.zeros(W.shape[0], n * r, W.shape[2], dtype=dtype)
    B = torch.zeros(*W.shape[:2], n * r, dtype=dtype)
    for e, i, rows, pair in _numbered(experts, given, shares):
        if pair.B.shape[0] != len(rows):
            raise FormatError(f"{pair.name} has {pair.B.shape[0]} rows, and not {len(rows)}.")
        A[e, i * r : i * r + pair.rank] = pair.A
        B[e, rows, i * r : i * r + pair.rank] = pair.B * (pair.scaling / scaling)
    path, _, weight = name.rpartition(".")
    rule = pairs[0].rule if len({pair.rule for pair in pairs}) == 1 else "lora"
    return PairData(
        path, A, B, SCALINGS[rule].alpha(scaling, n * r), "experts", weight,
        dropout=max(pair.dropout for pair in pairs), layout="out_in", rule=rule,
    )  # fmt: skip


def _share(own: list[Piece], given: Mapping[str, PairData]) -> bool:
    """Whether the pieces of an expert that the file has are of one A."""
    pairs = [given[piece.path] for piece in own if piece.path in given]
    return all(torch.equal(pair.A, pairs[0].A) for pair in pairs)


def _numbered(
    experts: Iterable[list[Piece]], given: Mapping[str, PairData], shares: bool
) -> Iterator[tuple[int, int, Tensor, PairData]]:
    """(expert, place of its A, rows, pair) of every piece that the file has."""
    for e, own in enumerate(experts):
        for i, piece in enumerate(own):
            if piece.path in given:
                yield e, 0 if shares else i, piece.rows, given[piece.path]
