"""For the ``Trainer`` of Lightning: checkpoints that hold the adapter and not the base model."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lora_inject.integrations.trained import trained_tensors
from lora_inject.state import require_fit


class AdapterCheckpoint(Callback):
    """Lets Lightning write and resume checkpoints that hold adapter tensors alone.

    What ``ModelCheckpoint`` and ``save_checkpoint`` write has in its ``state_dict`` what trains and
    nothing else. Resuming needs the same base model with the same adapters injected, and every
    tensor of the checkpoint must have its place.

    Example:
        >>> trainer = Trainer(callbacks=[AdapterCheckpoint()])  # doctest: +SKIP
        >>> trainer.fit(module, ckpt_path="last")  # doctest: +SKIP
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning load what does not name the base model; refuses one without adapters."""
        trained_tensors(pl_module)
        self._strict = pl_module._strict_loading
        pl_module.strict_loading = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning load as before."""
        pl_module._strict_loading = self._strict

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the base model out."""
        own = trained_tensors(pl_module)
        checkpoint["state_dict"] = {key: checkpoint["state_dict"][key] for key in own}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of other adapters, which Lightning would load in part."""
        shapes = {key: tuple(value.shape) for key, value in trained_tensors(pl_module).items()}
        require_fit("the checkpoint does not fit the model", shapes, checkpoint["state_dict"])
