"""An adapter that was read, on its way into a model: everything is checked before it goes in."""

from collections.abc import Callable

import torch

from lora_inject.changes.edits import run, undo
from lora_inject.core.look import Look
from lora_inject.core.removal import remove_adapters
from lora_inject.files import cautions, left_out
from lora_inject.files.as_new import plan_to_put_in
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.layout import Layout
from lora_inject.files.rows import values_for
from lora_inject.files.stored import Stored
from lora_inject.settings import check_bias


class Loading:
    """An adapter for the one of its name in a model, or for the model as a new one.

    Args:
        look: the model.
        data: what was read.
        adapter: the name to load it under.
        dtype: of a new adapter's A and B.
        other_base: whether to load although the model is not the base that it was made for.

    Raises:
        LoRAInjectError: it does not fit the model, which has not changed.
    """

    def __init__(
        self,
        look: Look,
        data: AdapterData,
        adapter: str,
        dtype: torch.dtype | str | None,
        other_base: bool,
    ) -> None:
        self.look, self.data, self.adapter = look, data, adapter
        wanted = Layout(look, data, adapter)
        if not other_base:
            wanted.check_base()
        self._apply: Callable[[], object]
        self._undo: Callable[[], object]
        if adapter in look.known:
            stored = Stored(look.model, adapter, look)
            if data.bias:
                stored.check_bias(check_bias(data.bias))
            pairs = wanted.pairs_by_key | values_for(stored.pairs, wanted.tables)
            edits = stored.filled({**wanted.tensors, **pairs}, wanted.scalings)
            self._apply, self._undo = lambda: run(edits), lambda: undo(edits)
        else:
            self._apply = plan_to_put_in(wanted, adapter, dtype, use=not look.used).apply
            self._undo = lambda: remove_adapters(Look(look.model), [adapter])

    def apply(self) -> None:
        """Put it in, all of it or nothing."""
        self._apply()

    def warn(self) -> None:
        """Say what its user needs to know, once it is in."""
        if self.look.used and self.adapter not in self.look.known:
            cautions.warn_of_unused(self.look, self.adapter)
        left_out.warn_of_missing_others(self.data, self.look, self.adapter)

    def undo(self) -> None:
        """Take it out again."""
        self._undo()
