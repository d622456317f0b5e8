"""What a ``Trainer`` writes of an adapted model, and reads again.

All of its ways to write lead through its method ``_save``, in which the model, or the parts of it
that are models of transformers, save themselves. For the length of that they save their adapters.
"""

import re
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lora_inject.core.adapter import DEFAULT_ADAPTER
from lora_inject.core.lend import lend, take_back
from lora_inject.core.look import Look
from lora_inject.errors import FormatError, LoRAInjectError, warn
from lora_inject.files.formats import named_format
from lora_inject.files.formats.storage import read_tensors
from lora_inject.files.left_out import require_nothing_left_out
from lora_inject.files.save_load import write
from lora_inject.files.stored import Stored
from lora_inject.integrations.trained import (
    require_trained,
    trained_tensors,
    with_settings,
    without_settings,
)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
_BESIDE = "adapters.safetensors"  # in checkpoints of what is no model of transformers


def write_adapters(trainer: Any, model: Any, callback: Any) -> None:
    """Let a trainer write adapters, and resume from what it wrote.

    Args:
        trainer: a ``Trainer``.
        model: its model.
        callback: an ``AdapterCheckpoint``; without it the trainer writes what it wrote before.
    """
    lend(model, "load_state_dict", partial(_load, model))
    if not isinstance(vars(trainer).get("_save"), _Saving):
        trainer._save = _Saving(trainer, model)
        trainer.create_model_card = partial(_write_card, model, trainer.create_model_card)
        if not isinstance(model, PreTrainedModel):
            trainer._load_from_checkpoint = partial(_resume, model)
    trainer._save.callbacks[callback] = None


def require_resumable(model: Any, peft: bool) -> None:
    """Refuse before training what could not be saved, or not be resumed.

    Raises:
        LoRAInjectError: the model has no adapters, or the trainer cannot load a part of it.
        FormatError: PEFT has no word for an adapter.
    """
    trained_tensors(model)
    look, parts = Look(model), _parts(model)
    if not hasattr(model, "save_pretrained") or not parts:
        raise LoRAInjectError(
            f"Trainer resumes a {type(model).__name__} from whole checkpoints only.",
            remedy="Leave AdapterCheckpoint out, or use a PreTrainedModel.",
        )
    try:
        inside = {module for part in parts for module in look.index.below(part)}
        for module in look.adapted if peft else ():
            if module not in inside:
                raise FormatError("it is no part of a model of transformers.",
                                  path=look.index.path(module))  # fmt: skip
        for part in parts if peft else ():
            for name in Look(part).known:
                named_format("peft", "format").to_state(Stored(part, name).data())
    except LoRAInjectError as error:
        problem = str(error).removesuffix(error.remedy).rstrip()
        also = "" if parts == [model] else (
            f", or inject into {look.index.path(parts[0])} alone, as it is saved on its own"
        )  # fmt: skip
        raise FormatError(
            f"AdapterCheckpoint cannot write PEFT files beside its checkpoints: {problem}",
            remedy=f"Leave them out: AdapterCheckpoint(peft=False){also}.",
        ) from error


class _Saving:
    """A trainer's ``_save``, with adapters in place of whole models where there are some."""

    def __init__(self, trainer: Any, model: Any) -> None:
        self.trainer, self.model, self.own = trainer, model, trainer._save
        self.callbacks: dict[Any, None] = {}

    def __call__(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write to a directory; the trainer's own where none is given."""
        folder, model = Path(output_dir or self.trainer.args.output_dir), self.model
        is_checkpoint = _CHECKPOINT.fullmatch(folder.name) is not None
        look, parts, peft = Look(model), list[Any](), False
        is_merged = any(state.merged for state in look.adapted.values())
        there = self.trainer.callback_handler.callbacks
        callbacks = [callback for callback in self.callbacks if callback in there]
        if look.adapted and callbacks and not is_merged:
            peft = callbacks[-1].peft  # of several, the last one that the trainer still has
            look.require_awake()
            if is_checkpoint or (peft and _is_all(look)):
                parts = _parts(model)
        for part in parts:
            resumes = is_checkpoint and part is model
            lend(part, "save_pretrained", partial(_write, part, resumes, peft))
        try:
            self.own(output_dir, state_dict)
        finally:
            for part in parts:
                take_back(part, "save_pretrained")
        if parts and is_checkpoint and not isinstance(model, PreTrainedModel):
            _write_tensors(model, folder / _BESIDE, None)


def _write(
    part: Any, resumes: bool, peft: bool, directory: str | PathLike[str],
    is_main_process: bool = True, state_dict: Any = None, **options: Any,
) -> None:  # fmt: skip
    """What ``save_pretrained`` does, for adapters."""
    if not (resumes or peft):
        type(part).save_pretrained(part, directory, is_main_process, state_dict, **options)
        return
    if not is_main_process:
        return
    if resumes:  # Trainer reads nothing but the tensors
        part.config.save_pretrained(directory)
        _write_tensors(part, Path(directory) / "model.safetensors", state_dict)
    names = set(Look(part).known) if peft else set()
    for name in names:
        alone = len(names) == 1 or name == DEFAULT_ADAPTER  # as PEFT has it
        file = Path(directory) if alone else Path(directory) / name
        stored = Stored(part, name)
        write(stored, stored.data(), file)  # whatever else trains is beside it


def _write_tensors(model: nn.Module, file: Path, state_dict: Mapping[str, Any] | None) -> None:
    """Write what trains to a file."""
    own = trained_tensors(model)
    given = own if state_dict is None else state_dict  # one that was gathered from all processes
    tensors = with_settings(model, {key: given[key] for key in own})
    save_file(tensors, file, metadata={"format": "pt"})


def _write_card(model: nn.Module, own: Any, *args: Any, **kwargs: Any) -> None:
    """What ``create_model_card`` does, which leaves the last lines of PEFT's to PEFT's models."""

    def finish(folder: str) -> None:
        card = ModelCard.load(Path(folder) / "README.md")
        card.data.library_name = "peft"
        card.save(Path(folder) / "README.md")

    lend(model, "create_or_update_model_card", finish)
    try:
        own(*args, **kwargs)
    finally:
        take_back(model, "create_or_update_model_card")


def _resume(model: nn.Module, checkpoint: str) -> None:
    """What ``_load_from_checkpoint`` does, of trainers that make a model anew of what they wrote.

    Raises:
        FormatError: it was written without adapters, or with others.
    """
    file = Path(checkpoint) / _BESIDE
    if not file.is_file():
        raise FormatError(
            f"{checkpoint} has no {_BESIDE}: it was written without AdapterCheckpoint.",
            remedy="Resume with the trainer that wrote it.",
        )
    model.load_state_dict(read_tensors(file)[0], strict=False)


def _load(
    model: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """What ``load_state_dict`` does, but a checkpoint without the base model has to fit."""
    tensors = without_settings(state_dict)
    if not Look(model).states:
        if len(tensors) < len(state_dict):
            raise LoRAInjectError(
                "the checkpoint holds adapters, and the model has none.",
                remedy="Call inject with the arguments of the first run, and resume then.",
            )
        return type(model).load_state_dict(model, state_dict, strict, assign)
    base = model.state_dict().keys() - trained_tensors(model).keys()
    alone = not strict and not base & state_dict.keys()
    if alone:
        require_trained(model, tensors)
    result = type(model).load_state_dict(model, state_dict, strict, assign)
    if alone:  # that the base is in no checkpoint is no news
        result.missing_keys[:] = [key for key in result.missing_keys if key not in base]
    return result


def _parts(model: nn.Module) -> list[Any]:
    """The outermost models of transformers in it that hold adapters: as a rule the model itself."""
    look, found, inside = Look(model), list[nn.Module](), set[nn.Module]()
    for module in look.index.modules:
        if isinstance(module, PreTrainedModel) and module not in inside:
            below = look.index.below(module)
            inside |= {*below}
            if any(each in look.adapted for each in below):
                found.append(module)
    return found


def _is_all(look: Look) -> bool:
    """Whether the adapters are all that trains; else a warning says what a directory is then."""
    try:
        require_nothing_left_out(look, "an adapter's directory")
    except LoRAInjectError as error:
        warn(f"{error} So the whole model is written, which load(model, directory) reads.")
        return False
    return True
