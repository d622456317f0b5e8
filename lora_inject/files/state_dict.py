"""An adapter as a state dict in loralib's keys, and back."""

from collections.abc import Mapping
from typing import overload

from torch import Tensor, nn

from lora_inject.core.drift import require_nothing_gone
from lora_inject.core.travelling import SettingsByKey, said, saying
from lora_inject.errors import ArgumentError, FormatError
from lora_inject.files.formats import in_memory, named_format
from lora_inject.files.formats.state import AdapterState
from lora_inject.files.left_out import require_nothing_left_out, warn_of_unsaid_others
from lora_inject.files.stored import Stored
from lora_inject.files.token_rows import warn_of_unsaved_rows
from lora_inject.own import Model
from lora_inject.settings import BiasMode
from lora_inject.sharding import whole
from lora_inject.variants import OTHER


@overload
def lora_state_dict(
    model: nn.Module,
    bias: BiasMode | None = None,
    *,
    adapter: str | None = None,
    full: bool = True,
    format: None = None,
) -> dict[str, Tensor]: ...
@overload
def lora_state_dict(
    model: nn.Module,
    bias: BiasMode | None = None,
    *,
    adapter: str | None = None,
    full: bool = True,
    format: str,
) -> AdapterState: ...
def lora_state_dict(
    model: nn.Module,
    bias: BiasMode | None = None,
    *,
    adapter: str | None = None,
    full: bool = True,
    format: str | None = None,
) -> dict[str, Tensor]:
    """What an adapter is, in loralib's keys: A, B, and the biases and modules it trained.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2, bias="lora_only")
        >>> list(lora_state_dict(model))
        ['0.lora_A', '0.lora_B', '0.bias']
        >>> state = lora_state_dict(model, format="peft")
        >>> list(state)[0], state.config["r"]
        ('base_model.model.0.lora_A.weight', 2)

    Args:
        model: an adapted model, or a wrapper that holds it.
        bias: the bias mode to save; it must be the one that the adapter was trained with, which
            None stands for.
        adapter: the adapter's name; None for the only one there is, or the only one in use.
        full: gather sharded tensors whole, for which all ranks must call this; False leaves them
            as DTensors, as ``torch.distributed.checkpoint`` takes them.
        format: None for loralib's keys; "peft", "diffusers" or "kohya" for what ``save`` writes
            in that format, without a file. The dict then has the format's ``config`` too, and
            ``load(model, state)`` reads it. Of diffusers the keys are those of the model, without
            its name in a pipeline: ``pipe.save_lora_weights(folder, unet_lora_layers=state)``.

    Returns:
        The tensors themselves, detached, by names without the adapter's. With them go rank, alpha
        and variant, as the metadata of torch's own state dicts does: ``torch.save`` keeps both,
        while a dict that is made of the items holds tensors alone.

    Raises:
        ArgumentError: the adapter is not known or not unique, or another bias mode would lose what
            was trained.
        FormatError: the format has no word for something of the adapter.
        LoRAInjectError: the model has no adapters, is merged or inside a block, or a layer of the
            adapter was replaced since, or something was thawed or came since and trains.
    """
    stored = Stored(model, adapter)
    if bias is not None:
        stored.check_bias(bias)
    require_nothing_gone(stored.look, stored.name)
    require_nothing_left_out(stored.look, "the state dict")
    if format is not None:
        return _in_format(stored, format, full)
    tensors = {**stored.tensors(), **stored.tied()}
    values = {key: whole(t.detach()) if full else t.detach() for key, t in tensors.items()}
    return saying(values, stored.settings())


def _in_format(stored: Stored, format: str, full: bool) -> AdapterState:
    if format not in in_memory():
        raise ArgumentError(f"format must be None or one of {in_memory()}, not {format!r}.")
    if not full:
        raise ArgumentError("full=False leaves shards, which no format has.")
    data = stored.data()
    warn_of_unsaved_rows(stored.look, stored.paths, data.tensors)
    warn_of_unsaid_others(data, stored.name, format)
    state: AdapterState = named_format(format, "format").to_state(data)
    for key, tensor in state.items():
        state[key] = tensor.contiguous()
    return state


def load_lora_state_dict(
    model: Model, state: Mapping[str, Tensor], *, adapter: str | None = None
) -> Model:
    """Fill an adapter that is in the model with values, all of them or none.

    Parameters stay the same objects, so that an optimizer and a compiled model stay valid. A
    smaller rank is padded with zeros, and the scaling stays the model's: another one, which the
    state of ``lora_state_dict`` tells, goes into B. Tensors alone are taken as they are.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2)
        >>> _ = load_lora_state_dict(model, lora_state_dict(model))

    Args:
        model: an adapted model, or a wrapper that holds it.
        state: what ``lora_state_dict`` returned; prefixes of wrappers are understood. In a sharded
            model every rank takes its part of a whole value.
        adapter: the adapter's name; None for the only one there is, or the only one in use.

    Returns:
        The same model.

    Raises:
        FormatError: keys are missing, unexpected or of another shape, or values are not finite.
        ArgumentError: the adapter is not known or not unique.
        LoRAInjectError: the model has no adapters, is merged or inside a block.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ArgumentError(f"state must be a mapping of names to tensors, not {type(state)}.")
    settings = said(state)
    scalings = {key.removesuffix("lora_A"): each.factor for key, each in settings.items()}
    stored = Stored(model, adapter)
    _require_same_rows(stored.settings(), settings)
    stored.fill(_as_they_stand(state, settings), scalings)
    return model


def _require_same_rows(own: SettingsByKey, given: SettingsByKey) -> None:
    """Refuse rows of a table that are for other ids.

    Raises:
        FormatError: they are.
    """
    for key, theirs in given.items():
        if key in own and not key.endswith("lora_A") and own[key].variant != theirs.variant:
            raise FormatError(
                f"{key} is for {theirs.variant}, and here for {own[key].variant}.",
                remedy="Nothing was loaded.",
            )


def _as_they_stand(state: Mapping[str, Tensor], settings: SettingsByKey) -> dict[str, Tensor]:
    """The values with the pairs of tied layers as these stand: they may not be tied here."""
    found = dict(state)
    for key, each in settings.items():
        start = key.removesuffix("A")
        turned = {
            f"{start}{role}": value.transpose(-2, -1)
            for role, other in OTHER.items() if each.turned and role
            if isinstance(value := state.get(f"{start}{other}"), Tensor) and value.dim() > 1
        }  # fmt: skip
        found |= turned
    return found
