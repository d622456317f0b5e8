"""For the ``Trainer`` of transformers: checkpoints that hold the adapter and not the base model."""

from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_inject.core.lend import lend, take_back
from lora_inject.core.look import Look
from lora_inject.core.travelling import ENTRY, as_entry
from lora_inject.errors import FormatError, LoRAInjectError
from lora_inject.files.formats import named_format
from lora_inject.files.save_load import write
from lora_inject.files.stored import Stored
from lora_inject.integrations.first_step import FirstStep
from lora_inject.integrations.trained import require_trained, trained_tensors


class AuditFirstStep(TrainerCallback):
    """Lets the ``Trainer`` audit the model at the first step, with that step's batch and optimizer.

    What is found is a ``LoRAInjectWarning``; nothing of the run is changed by it.

    Example:
        >>> trainer = Trainer(model, arguments, callbacks=[AuditFirstStep()])  # doctest: +SKIP

    Args:
        strict: raise on errors and warnings of the audit.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._first: FirstStep | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the first batch."""
        self._first = FirstStep(kwargs["model"], self.strict)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit the model, once.

        Raises:
            LoRAInjectError: with ``strict``, something is wrong.
        """
        if self._first is not None:
            self._first.audit(kwargs.get("optimizer"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of a model that took no step."""
        if self._first is not None:
            self._first.stop()


class AdapterCheckpoint(TrainerCallback):
    """Lets the ``Trainer`` write and resume checkpoints that hold adapter tensors alone.

    ``model.safetensors`` in a checkpoint then has what trains and the adapters' settings, which
    must be the model's, and ``Trainer`` resumes from it by itself. Beside it lies the adapter as a
    PEFT directory, for ``load`` and other libraries. For this the model has a ``save_pretrained``
    of its own while it trains, which ``Trainer`` alone notices, and a ``load_state_dict`` that
    refuses other adapters; ``strip`` takes both off. ``Trainer`` itself needs accelerate.

    Example:
        >>> trainer = Trainer(model, arguments, callbacks=[AdapterCheckpoint()])  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP

    Args:
        peft: whether to write the PEFT files too; some kinds of layer have no word there.
        audit: whether to audit the model at the first step, as ``AuditFirstStep`` does.
    """

    def __init__(self, peft: bool = True, audit: bool = False) -> None:
        self.peft = peft
        self._audit = AuditFirstStep() if audit else None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model refuse checkpoints of other adapters, which ``Trainer`` would half load."""
        lend(kwargs["model"], "load_state_dict", partial(_load, kwargs["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model save itself in our way.

        Raises:
            LoRAInjectError: it has no adapters, or ``Trainer`` cannot load a part of it.
            FormatError: a PEFT file has no word for one of them, such as a tied ``train_also``.
        """
        model = kwargs["model"]
        trained_tensors(model)
        if not hasattr(model, "save_pretrained"):
            raise LoRAInjectError(
                f"Trainer resumes a {type(model).__name__} from whole checkpoints only.",
                remedy="Leave AdapterCheckpoint out, or use a PreTrainedModel.",
            )
        if self.peft:
            _require_peft(model)
        lend(model, "save_pretrained", partial(_write, model, self.peft))
        if self._audit is not None:
            self._audit.on_train_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit the model before the first step, where that is wanted."""
        if self._audit is not None:
            self._audit.on_pre_optimizer_step(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model back its own way."""
        take_back(kwargs["model"], "save_pretrained")
        if self._audit is not None:
            self._audit.on_train_end(args, state, control, **kwargs)


def _require_peft(model: Any) -> None:
    """Refuse at the start what the first save would refuse.

    Raises:
        FormatError: PEFT has no word for an adapter.
    """
    try:
        for name in Look(model).known:
            named_format("peft", "format").to_state(Stored(model, name).data())
    except FormatError as error:
        problem = str(error).removesuffix(error.remedy).rstrip()
        raise FormatError(
            f"AdapterCheckpoint cannot write PEFT files beside its checkpoints: {problem}",
            remedy="Leave them out: AdapterCheckpoint(peft=False).",
        ) from error


def _load(
    model: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """What ``load_state_dict`` does, but a checkpoint without the base model has to fit."""
    if not Look(model).states:
        if ENTRY in state_dict:
            raise LoRAInjectError(
                "the checkpoint holds adapters, and the model has none.",
                remedy="Call inject with the arguments of the first run, and resume then.",
            )
        return type(model).load_state_dict(model, state_dict, strict, assign)
    base = model.state_dict().keys() - trained_tensors(model).keys()
    alone = not strict and not base & state_dict.keys()
    if alone:
        require_trained(model, {key: t for key, t in state_dict.items() if key != ENTRY})
    result = type(model).load_state_dict(model, state_dict, strict, assign)
    if alone:  # that the base is in no checkpoint is no news
        result.missing_keys[:] = [key for key in result.missing_keys if key not in base]
    return result


def _write(
    model: Any,
    peft: bool,
    directory: str | PathLike[str],
    is_main_process: bool = True,
    **options: Any,
) -> None:
    """What ``save_pretrained`` does, for what trains alone."""
    if "state_dict" not in options:  # nobody but Trainer gives one
        type(model).save_pretrained(model, directory, is_main_process, **options)
        return
    own, state_dict = trained_tensors(model), options["state_dict"]
    given = own if state_dict is None else state_dict  # one that was gathered from all processes
    if not is_main_process:
        return
    model.config.save_pretrained(directory)
    tensors = {key: given[key].contiguous() for key in own}
    tensors[ENTRY] = as_entry(model)  # Trainer reads nothing but tensors
    save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
    names = set(Look(model).known) if peft else set()
    for name in names:
        file = Path(directory) / name if len(names) > 1 else Path(directory)
        stored = Stored(model, name)
        write(stored, stored.data(), file)  # whatever else trains is in model.safetensors
