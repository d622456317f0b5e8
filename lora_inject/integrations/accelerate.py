"""For accelerate: ``save_state`` and ``load_state`` of what trains, without the base model."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_inject.core.look import Look
from lora_inject.errors import LoRAInjectError
from lora_inject.files.formats.storage import read_tensors
from lora_inject.integrations.trained import (
    require_trained,
    trained_tensors,
    with_settings,
    without_settings,
)

_IN_SHARDS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def checkpoint_adapters(accelerator: Accelerator) -> None:
    """Let ``save_state`` write what trains in adapted models, and ``load_state`` read it.

    Each adapted model gets a file ``adapters.safetensors`` (``adapters_1.safetensors``, ...) with
    what trains and the adapters' settings, in place of one with everything. Resuming needs the same
    base model with the same adapters injected. Optimizers, schedulers, random states and models
    without adapters are saved by accelerate as ever.

    Example:
        >>> accelerator = Accelerator()  # doctest: +SKIP
        >>> checkpoint_adapters(accelerator)  # doctest: +SKIP
        >>> accelerator.save_state("checkpoint")  # doctest: +SKIP

    Args:
        accelerator: before or after ``prepare``.

    Raises:
        LoRAInjectError: it shards models (FSDP, DeepSpeed, Megatron), and saves them in a way of
            its own.
    """
    if accelerator.distributed_type in _IN_SHARDS:
        raise LoRAInjectError(
            f"with {accelerator.distributed_type} accelerate saves shards, the base's too.",
            remedy="Call save(model, folder) on all ranks beside it.",
        )

    def write(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for number, model in _adapted(models):
            tensors = with_settings(model, trained_tensors(model))
            if accelerator.is_main_process:
                save_file(tensors, _file(folder, number), metadata={"format": "pt"})
            del weights[number]  # the whole model's, which accelerate would write

    def read(models: list[nn.Module], folder: str) -> None:
        found = []
        for number, model in _adapted(models):
            tensors, _ = read_tensors(_file(folder, number))
            require_trained(model, without_settings(tensors))
            found.append((number, model, tensors))
        for number, model, tensors in found:
            model.load_state_dict(tensors, strict=False)
            del models[number]

    def _adapted(models: list[nn.Module]) -> list[tuple[int, nn.Module]]:
        inner = [(i, accelerator.unwrap_model(model)) for i, model in enumerate(models)]
        return [(i, model) for i, model in reversed(inner) if Look(model).adapted]

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def _file(folder: Any, number: int) -> Path:
    return Path(folder) / f"adapters{f'_{number}' if number else ''}.safetensors"
