"""What the checkpoint of an adapted model has to hold: what training changes, and nothing else."""

from collections.abc import Mapping

from torch import Tensor, nn

from lora_inject.core.look import Look
from lora_inject.core.state import owned as tensors_of
from lora_inject.core.travelling import ENTRY, as_entry
from lora_inject.files.fit_checks import require_fit
from lora_inject.own import own_tensor
from lora_inject.settings import BASE


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Of ``model.state_dict()`` what training changes.

    That is what belongs to the adapters, every one of them, in use or not: A and B, and the biases,
    ``train_also`` modules and statistics that are trained in place. And whatever else trains: other
    parameters that require a gradient, and buffers outside of what was injected. A tensor that is
    registered in several places comes once.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2, bias="lora_only")
        >>> list(trained_tensors(model))
        ['0.bias', '0.lora_A', '0.lora_B']

    Args:
        model: an adapted model, or a wrapper that holds it.

    Returns:
        The tensors by their keys in the state dict.

    Raises:
        LoRAInjectError: the model has no adapters, is merged or inside a block.
    """
    look = Look(model)
    look.require_awake()
    look.require_adapters()
    owned = {
        module: {name for name, owner, _ in tensors_of(state) if owner != BASE or name in places}
        for module, state in look.adapted.items()
        for places in [{trained.name for trained in state.trained}]
    }
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in look.index.by_path.items():
        for name in (*module._parameters, *module._buffers):
            tensor = own_tensor(module, name)
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            moves = name in module._buffers and module not in look.states
            if name in owned.get(module, ()) or tensor.requires_grad or moves:
                found.setdefault(id(tensor), (f"{path}.{name}".lstrip("."), tensor.detach()))
    return dict(found.values())


def with_settings(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model for a file that holds nothing else, with the settings of its adapters.

    They are beside the tensors of what ``inject`` was called on, which compares them.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2)
        >>> list(with_settings(model, trained_tensors(model)))
        ['0.lora_A', '0.lora_B', 'lora_settings']

    Args:
        model: an adapted model.
        tensors: what ``trained_tensors`` returned.

    Returns:
        The tensors, contiguous, and the settings.
    """
    look = Look(model)
    said = {
        f"{look.index.path(root)}.{ENTRY}".lstrip("."): as_entry(root) for root, _ in look.calls
    }
    return {key: t.contiguous() for key, t in tensors.items()} | said


def without_settings(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of such a file alone.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2)
        >>> list(without_settings(with_settings(model, trained_tensors(model))))
        ['0.lora_A', '0.lora_B']

    Args:
        tensors: what is in the file.

    Returns:
        The tensors by their keys in the state dict.
    """
    return {key: t for key, t in tensors.items() if key.rpartition(".")[2] != ENTRY}


def require_trained(model: nn.Module, checkpoint: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that is not exactly what training changes in the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = inject(model, "0", r=2)
        >>> require_trained(model, trained_tensors(model))

    Args:
        model: an adapted model.
        checkpoint: the tensors by their keys in the state dict.

    Raises:
        FormatError: one is missing, unexpected, of another shape or not finite.
    """
    shapes = {key: tuple(value.shape) for key, value in trained_tensors(model).items()}
    require_fit("the checkpoint does not fit the model", shapes, checkpoint)
