"""A file for another number of tokens than the model has, told before shapes are compared."""

from collections.abc import Iterable

from torch import Tensor, nn

from lora_inject.compat.marks import resizable_embeddings
from lora_inject.core.paths import bare
from lora_inject.errors import FormatError
from lora_inject.files.formats.data import PairData


def require_rows(
    model: nn.Module,
    pairs: Iterable[tuple[str, nn.Module, PairData]],
    tensors: Iterable[tuple[str, nn.Module, Tensor]],
) -> None:
    """Refuse a file for a vocabulary of another size.

    Args:
        model: the model.
        pairs: path, module and pair of each adapted layer of the file.
        tensors: path, module and tensor of all else in it.

    Raises:
        FormatError: the model has other rows, by path, with the call that resizes them.
    """
    modules = resizable_embeddings(bare(model))
    rows = [(path, m, _rows(pair)) for path, m, pair in pairs if m in modules and not pair.part]
    rows += [(path, m, len(t)) for path, m, t in tensors if m in modules and t.dim()]
    for path, module, wanted in rows:
        own = len(modules[module])
        if own != wanted:
            raise FormatError(
                f"it has {own:,} rows, one for each token, and the file has {wanted:,}.",
                path=path,
                remedy=f"Call model.resize_token_embeddings({wanted}) first.",
            )


def _rows(pair: PairData) -> int:
    """How many rows the adapted weight has."""
    return int(pair.A.shape[1] if pair.form == "embedding" else pair.B.shape[0])
