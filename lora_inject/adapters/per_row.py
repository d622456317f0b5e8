"""A different adapter for each row of a batch, as a server needs it (Punica, arXiv 2310.18547)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.adapters.batch import Batch, apart
from lora_inject.adapters.rows import Rows
from lora_inject.core.adapter import Adapter
from lora_inject.core.blocks import block
from lora_inject.core.look import Look
from lora_inject.core.state import State
from lora_inject.errors import ArgumentError, UnsupportedLayerError


@contextmanager
def per_row(model: nn.Module, adapters: Iterable[str | None]) -> Iterator[nn.Module]:
    """Give every row of a batch an adapter of its own, whatever is in use outside of the block.

    It is the model that changes, for every thread that runs it: give each a copy of its own.
    The first dimension of every adapted layer's input counts the rows, or what the model is called
    with has expanded each row in place (``generate`` does for beams). Works in training too:
    adapters learn from their rows if they train (``use(model, "fr", "de")`` before the block).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, nn.Linear, r=2, adapter="fr")
        >>> _ = inject(model, nn.Linear, r=4, adapter="de")
        >>> with per_row(model, ["fr", "de", None]):
        ...     y = model(torch.randn(3, 4))

    Args:
        model: an adapted model.
        adapters: for each row the name of an adapter, or None for the base model.

    Yields:
        The same model.

    Raises:
        ArgumentError: an adapter is not known, or has trained biases or modules in place, of which
            a batch can have one only.
        UnsupportedLayerError: an adapter acts in a layer's weight, which all rows share.
        LoRAInjectError: the model is merged or disabled; and inside of the block, a layer's input
            has another number of rows, or rows of its own, as images have beside token ids.
    """
    names = _check_rows(adapters)
    wanted = frozenset(name for name in names if name is not None)
    look = Look(model)
    look.require_adapters()
    look.require_known(wanted, "adapters")
    look.require_no_block(but_rows=True)
    look.require_unmerged()
    for path, layer in look.layers.items():
        _require_branches(path, look.states[layer].adapters, wanted)
    for module, trained in look.trained:
        for name in wanted & trained.owners.keys():
            raise ArgumentError(
                f"adapters: {name!r} trained {trained.text(module)}, which all rows of a batch "
                "share.",
                remedy="Use it alone.",
            )

    batch, others = Batch(model, len(names)), apart(look.index)

    def rows(module: nn.Module, state: State) -> Rows:
        chosen = [adapter for adapter in state.adapters if adapter.name in wanted]
        followed = None if module in others else batch
        return Rows(look.index.path(module), names, chosen, module, followed)

    with block(look, rows, batch.edits):
        yield model


def _check_rows(adapters: Any) -> tuple[str | None, ...]:
    names = tuple(adapters) if isinstance(adapters, Iterable) else ()
    if isinstance(adapters, str) or not names or not all(isinstance(n, str | None) for n in names):
        raise ArgumentError(
            f"adapters must be a list with a name or None for each row, not {adapters!r}."
        )
    return names


def _require_branches(path: str, adapters: Iterable[Adapter], wanted: frozenset[str]) -> None:
    for adapter in adapters:
        if adapter.name in wanted and adapter.way == "weight":
            raise UnsupportedLayerError(
                f"{adapter.name!r} acts in its weight, which all rows of a batch share.",
                path=path,
                remedy="Run the rows one adapter at a time, each with use.",
            )
