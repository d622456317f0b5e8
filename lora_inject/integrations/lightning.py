"""For the ``Trainer`` of Lightning: checkpoints that hold the adapter and not the base model."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_inject.integrations.first_step import FirstStep
from lora_inject.integrations.trained import require_trained, trained_tensors


class AdapterCheckpoint(Callback):
    """Lets Lightning write and resume checkpoints that hold adapter tensors alone.

    What ``ModelCheckpoint`` and ``save_checkpoint`` write has in its ``state_dict`` what trains and
    nothing else. Resuming needs the same base model with the same adapters injected, of the same
    settings, and every tensor of the checkpoint must have its place.

    Example:
        >>> trainer = Trainer(callbacks=[AdapterCheckpoint()])  # doctest: +SKIP
        >>> trainer.fit(module, ckpt_path="last")  # doctest: +SKIP

    Args:
        audit: whether to audit the model at the first step, with that step's batch and optimizer;
            what is found is a ``LoRAInjectWarning``, and nothing of the run is changed by it.
    """

    def __init__(self, audit: bool = False) -> None:
        self._audits = audit
        self._first: FirstStep | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning load what does not name the base model, which may not be made yet."""
        self._strict = pl_module._strict_loading
        pl_module.strict_loading = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without adapters, once ``setup`` and ``configure_model`` have made it."""
        trained_tensors(pl_module)
        self._first = FirstStep(pl_module) if self._audits else None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Audit the model, once."""
        if self._first is not None:
            self._first.audit(optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning load as before."""
        self._put_back(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The same where training ends with an exception, even before ``setup``."""
        self._put_back(pl_module)

    def _put_back(self, pl_module: LightningModule) -> None:
        if self._first is not None:
            self._first.stop()
        if hasattr(self, "_strict"):
            pl_module._strict_loading = self._strict
            del self._strict

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the base model out."""
        own, state_dict = trained_tensors(pl_module), checkpoint["state_dict"]
        for key in [key for key in state_dict if key not in own]:
            del state_dict[key]  # of what says the adapters' settings too, in its metadata

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of other adapters, which Lightning would load in part."""
        require_trained(pl_module, checkpoint["state_dict"])
