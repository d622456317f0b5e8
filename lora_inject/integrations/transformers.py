"""For the ``Trainer`` of transformers, and those made of it: adapters are what they write."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_inject.errors import LoRAInjectError
from lora_inject.integrations.calling import trainer_above
from lora_inject.integrations.first_step import FirstStep
from lora_inject.integrations.saving import require_resumable, write_adapters


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
    """Lets a trainer write adapters: in its checkpoints, from which it resumes, and at its end.

    A checkpoint holds what trains and the adapters' settings, which must be the model's; the
    trainer resumes from it by itself, and loads the best one at the end. What ``save_model`` and
    ``push_to_hub`` write is a PEFT directory, for ``load`` and other libraries. It lies in every
    checkpoint too. The same goes for trainers that are made of ``Trainer``, as TRL's and those of
    sentence-transformers: of a model of these the part that transformers saves is a PEFT
    directory. Merged or stripped, a model is written as a whole. ``Trainer`` needs accelerate.

    Example:
        >>> trainer = Trainer(model, arguments, callbacks=[AdapterCheckpoint()])  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
        >>> trainer.save_model("adapter")  # doctest: +SKIP
        >>> load(base_model, "adapter")  # doctest: +SKIP

    Args:
        peft: whether to write PEFT directories; some kinds of layer have no word there. Without,
            ``save_model`` writes the whole model, which ``load`` reads too.
        audit: whether to audit the model at the first step, as ``AuditFirstStep`` does.
    """

    def __init__(self, peft: bool = True, audit: bool = False) -> None:
        self.peft = peft
        self._audit = AuditFirstStep() if audit else None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the trainer write adapters, and refuse checkpoints of others.

        Raises:
            LoRAInjectError: no ``Trainer`` is calling.
        """
        self._take_over(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same for one that the callback was added to later; and refuse what it cannot save.

        Raises:
            LoRAInjectError: the model has no adapters, or the trainer cannot load a part of it.
            FormatError: a PEFT file has no word for one of them, such as a tied ``train_also``.
        """
        self._take_over(kwargs["model"])
        require_resumable(kwargs["model"], self.peft)
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
        """Let go of a model that took no step."""
        if self._audit is not None:
            self._audit.on_train_end(args, state, control, **kwargs)

    def _take_over(self, model: Any) -> None:
        trainer = trainer_above()
        if trainer is None:
            raise LoRAInjectError(
                "AdapterCheckpoint works for trainers that are a Trainer of transformers.",
                remedy="Call save(model, folder) instead.",
            )
        write_adapters(trainer, model, self)
