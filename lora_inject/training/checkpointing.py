"""Reentrant checkpointing in a model of one's own, which no switch tells of."""

from typing import Any

from lora_inject.changes.checkpointing import needing_edits
from lora_inject.core.commit import commit
from lora_inject.core.look import Look
from lora_inject.core.matcher import Matcher
from lora_inject.core.request import optional_patterns
from lora_inject.errors import ArgumentError
from lora_inject.own import Model


def reentrant_checkpointing(model: Model, after: Any) -> Model:
    """Let the adapters in blocks train that are checkpointed in the reentrant form.

    ``torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)`` gives what is in the block a
    gradient only if x needs one; with all before it frozen it does not. In models of transformers
    and diffusers ``inject`` sees to that. In others, name the module whose output goes into the
    first of these blocks, an embedding say: it then needs a gradient in training, and no value
    changes. ``use_reentrant=False`` needs none of this. ``strip`` undoes it.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
        >>> _ = inject(model, "1", r=2)
        >>> _ = reentrant_checkpointing(model, after="0")
        >>> model[0](torch.tensor([1, 2])).requires_grad
        True

    Args:
        model: an adapted model.
        after: patterns for the modules before the first checkpointed blocks, as in ``inject``.

    Returns:
        The same model.

    Raises:
        ArgumentError: no module is named.
        NoMatchError: a pattern selects nothing.
        LoRAInjectError: the model has no adapters.
    """
    look = Look(model)
    look.require_adapters()
    patterns = optional_patterns(after, "after")
    if not patterns:
        raise ArgumentError("after: name the module before the first checkpointed block.")
    matcher = Matcher(look)
    named = {p.module: None for each in patterns for p in matcher.modules_of("after", each)}
    commit(look, {}, values=[edit for module in named for edit in needing_edits(module, True)])
    return model
