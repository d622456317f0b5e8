"""``audit`` at the first step of a run that a trainer makes: on the batch that it was made with."""

from typing import Any

from torch import nn

from lora_inject.audit.audit import audited
from lora_inject.audit.observing import Hook
from lora_inject.core.look import Look
from lora_inject.errors import warn


class FirstStep:
    """What a model is first called with, kept until it is audited; then it takes itself out.

    Where nothing of it was called under a hook, as in a compiled model, it is looked at as it
    stands.

    Args:
        model: what holds the adapters: the model that ``inject`` was called on, or one around it.
        strict: raise on what is found, where it is more than notes; else warn of it.
    """

    def __init__(self, model: nn.Module, strict: bool = False) -> None:
        root = next((root for root, _ in Look(model).calls), model)
        self._model, self._root, self._strict = model, root, strict
        self._batch: Any = None
        self._handle = self._root.register_forward_pre_hook(Hook(self._keep), with_kwargs=True)
        self.is_over = False

    def audit(self, optimizer: Any) -> None:
        """Audit the model, once.

        Args:
            optimizer: what is about to take the first step.

        Raises:
            LoRAInjectError: with ``strict``, something is wrong.
        """
        if self.is_over:
            return
        batch = self._batch
        self.stop()
        own = getattr(optimizer, "optimizer", optimizer)  # what accelerate and Lightning wrap
        result = audited(self._model, batch, self._call, None, own)
        if self._strict:
            result.require_sound()
        elif result.failed:
            warn(str(result))

    def stop(self) -> None:
        """Let go of the model."""
        self.is_over, self._batch = True, None
        self._handle.remove()

    def _keep(self, _: Any, args: Any, kwargs: Any) -> None:
        """The first call."""
        if self._batch is None:
            self._batch = (args, kwargs)

    def _call(self, batch: Any) -> Any:
        args, kwargs = batch
        return self._root(*args, **kwargs)
