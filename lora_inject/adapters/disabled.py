"""The base model for a while: nothing runs, and former values stand in for what was trained."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lora_inject.core.blocks import block
from lora_inject.core.look import Look


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without its adapters, as before ``inject``, and then with them again.

    It is the model that changes, for every thread that runs it: give each a copy of its own.
    Layers have their own classes meanwhile, so the base costs what it cost before; biases and
    ``train_also`` modules that were trained show their former values. For the reference model of
    DPO or a KL term. Blocks may be nested, on parts too, and end in any order; an exception inside
    changes nothing. A model cannot be copied or pickled inside.

    Example:
        >>> with disabled(model), torch.no_grad():  # doctest: +SKIP
        ...     reference = model(**batch).logits

    Args:
        model: an adapted model or a part of one, merged or not.

    Yields:
        The same model.

    Raises:
        LoRAInjectError: the model has no adapters, or their weights were not kept when merging.
    """
    look = Look(model)
    look.require_adapters()
    look.require_kept()
    with block(look):
        yield model
