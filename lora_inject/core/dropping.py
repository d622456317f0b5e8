"""The dropouts of adapters, where tools look for dropout: in modules of torch.

A layer has a child for each probability with which one of its adapters drops something. Whoever
sets ``p``, or the mode, of every ``nn.Dropout`` in a model (trainers do) reaches adapters so. The
layer reads both and drops by itself, in its products.
"""

from torch import Tensor, nn

from lora_inject.arithmetic.thinning import Drops
from lora_inject.changes.edits import Edit, items_edits
from lora_inject.core.adapter import Dropping, Term
from lora_inject.core.state import State


class LoRADropout(nn.Dropout):
    """The probability with which an adapter of the layer around it drops; ``p`` may be set.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2, dropout=0.1)
        >>> model[0].lora_dropout
        LoRADropout(p=0.1, inplace=False)
        >>> model[0].lora_dropout.p = 0.0
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input: a layer that runs its children one after another is to compute the same."""
        return input


def probability(layer: nn.Module, name: str) -> float:
    """With which probability a layer drops now; 0 where the child of this name is not there."""
    child = layer._modules.get(name)
    return child.p if isinstance(child, nn.Dropout) and child.training else 0.0


def dropout_now(layer: nn.Module, term: Term) -> float:
    """With which probability a layer drops what A reads now."""
    return term.dropout and probability(layer, term.dropping.input)


def drops_now(layer: nn.Module, names: Dropping) -> Drops | None:
    """What a layer leaves out of an adapter now; None for nothing."""
    drops = Drops(probability(layer, names.rank), probability(layer, names.module))
    return drops if any(drops) else None


def dropping_edits(module: nn.Module, old: State | None, state: State | None) -> list[Edit]:
    """Give a layer the children that its adapters drop by, and no others; one that is there stays.

    Those of a new adapter have the mode of the layer.
    """
    before, now = _wanted(old), _wanted(state)
    if before.keys() == now.keys():
        return []
    children = module._modules
    kept = [(n, m) for n, m in children.items() if n in now or n not in before]
    names = {name for name, _ in kept}
    fresh = [(n, LoRADropout(p).train(module.training)) for n, p in now.items() if n not in names]
    return items_edits(children, [*kept, *fresh])


def _wanted(state: State | None) -> dict[str, float]:
    adapters = state.adapters if state else ()
    return {name: p for adapter in adapters for name, p in adapter.dropouts.items()}
