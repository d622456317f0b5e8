"""What DistributedDataParallel reduces was fixed when it wrapped the model.

What begins to train later has gradients of its own on each rank, and the ranks drift apart without
a word. So that is refused, whether the wrapper was passed or only the model inside of it.
"""

import gc
from collections.abc import Iterable

from torch import Tensor, distributed, nn

from lora_inject.changes.edits import Edit, put_flag
from lora_inject.compat.torch_private import reduced_parameters
from lora_inject.core.look import Look
from lora_inject.core.state import Fresh, States
from lora_inject.errors import LoRAInjectError


def require_reduced(look: Look, states: States, edits: Iterable[Edit], fresh: Fresh) -> None:
    """Refuse to let train what a wrapper around the model does not reduce.

    Raises:
        LoRAInjectError: it would, and adapters stay in the model.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    if not any(state is not None and state.is_adapted for state in states.values()):
        return  # strip, which ends the training
    new = [target for put, target, _, _, trains in edits if put is put_flag and trains]
    new += [t for own in fresh.values() for t in own.values() if t is not None and t.requires_grad]
    if new and _left_out(look, new):
        gc.collect()  # a wrapper that nobody holds any more
        if _left_out(look, new):
            raise LoRAInjectError(
                "DistributedDataParallel has wrapped the model and would not reduce the gradients "
                f"of {len(new):,} parameters that are to train from now on: its ranks would drift "
                "apart.",
                remedy="Let go of the wrapper (model = ddp.module; del ddp), do this, and wrap "
                "the model again; or let all that will ever train do so before it is wrapped "
                "(use(model, ..., train=[...]), and find_unused_parameters=True).",
            )


def _left_out(look: Look, new: Iterable[Tensor]) -> bool:
    """Whether wrappers are around the model, none of which reduces one of these."""
    wrappers = [w for w in _wrappers() if not look.index.paths.keys().isdisjoint(w.modules())]
    reduced = {id(tensor) for wrapper in wrappers for tensor in reduced_parameters(wrapper)}
    return bool(wrappers) and any(id(tensor) not in reduced for tensor in new)


def _wrappers() -> list[nn.parallel.DistributedDataParallel]:
    """Every one that there is: a model does not know what it was wrapped in."""
    kind = nn.parallel.DistributedDataParallel
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]
