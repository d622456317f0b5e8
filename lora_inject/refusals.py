"""What a layer must be before its adapters are changed; each refusal names the remedy."""

from torch import nn

from lora_inject.adapter import adapters_of, is_merged, state_of
from lora_inject.errors import LoRAInjectError
from lora_inject.layer import LoRALayer, is_intact
from lora_inject.placements import is_fully_sharded


def require_intact(path: str, layer: nn.Module) -> None:
    """Refuse a layer whose class, forward or parameters something else has changed.

    Raises:
        LoRAInjectError: it has been swapped again, FSDP or accelerate manages its A and B, or it
            has a forward of its own.
    """
    if is_fully_sharded(layer):
        raise LoRAInjectError(
            "FSDP shards and gathers its adapter and would go on doing so.",
            path=path,
            remedy="Save the adapter on all ranks, and load it into a model that is not sharded.",
        )
    names = [name for adapter in adapters_of(layer) for name in adapter.parameters]
    if "_hf_hook" in layer.__dict__ and any(layer.get_parameter(name).is_meta for name in names):
        raise LoRAInjectError(
            "accelerate has offloaded its adapter, and its hook would look for it.",
            path=path,
            remedy="Call accelerate.hooks.remove_hook_from_submodules(model) first.",
        )
    own = getattr(layer.__dict__.get("forward"), "__func__", None) is type(layer).forward
    if "forward" in layer.__dict__ and "_hf_hook" not in layer.__dict__ and not own:
        raise LoRAInjectError(
            "a forward was set on this very instance after inject, and it would go on adding.",
            path=path,
            remedy="Remove it first (del layer.forward).",
        )
    if not is_intact(layer):
        raise LoRAInjectError(
            f"its class is now {type(layer).__name__}, put there after inject.",
            path=path,
            remedy="Undo that first, or strip before it is done.",
        )


def require_switchable(path: str, layer: nn.Module) -> None:
    """Refuse a layer that cannot run an adapter: its class was replaced while none was in use.

    Raises:
        LoRAInjectError: it is one.
    """
    if not isinstance(layer, LoRALayer) and not is_intact(layer):
        raise LoRAInjectError(
            f"its class became {type(layer).__name__} while none of its adapters was in use.",
            path=path,
            remedy="Put the adapters in use before that is done (fully_shard, parametrize).",
        )


def require_no_block(path: str, layer: nn.Module) -> None:
    """Refuse a layer inside a ``with disabled(...)`` or ``with per_row(...)`` block.

    Raises:
        LoRAInjectError: it is.
    """
    state = state_of(layer)
    if state is not None and (state.disabled or state.rows is not None):
        block = "disabled" if state.disabled else "per_row"
        raise LoRAInjectError(
            f"it is inside a {block} block now.", path=path, remedy="Leave the with block first."
        )


def require_ready(path: str, layer: nn.Module) -> None:
    """Refuse a layer that is merged, or inside a block that changes what runs.

    Raises:
        LoRAInjectError: it is.
    """
    state = state_of(layer)
    if state is None or state.is_plain:
        return
    require_no_block(path, layer)
    if is_merged(layer):
        raise LoRAInjectError("its adapter is merged now.", path=path, remedy="Call unmerge first.")


def require_kept(path: str, layer: nn.Module) -> None:
    """Refuse a layer whose former weight is gone.

    Raises:
        LoRAInjectError: it was merged with ``keep=False``.
    """
    state = state_of(layer)
    # Not `None in ...`, which asks each tensor whether it equals None, and that takes 14 us.
    if state is not None and any(kept is None for kept in state.former.values()):
        raise LoRAInjectError(
            "its adapter was merged with keep=False, so that its weight is gone.",
            path=path,
            remedy="strip(model, merge=True) leaves it merged.",
        )
