"""Watching layers while a model runs: hooks that see inputs and gradients, and go whatever happens.

Layers that read one tensor (the projections of attention) share its moments: what they have in
common is computed and kept once. Which ones they are is known when the tensor is gone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.arithmetic.moments import Moments
from lora_inject.arithmetic.product import without_autocast
from lora_inject.changes.modes import in_eval_mode
from lora_inject.compat.torch_private import Seen
from lora_inject.core.class_swap import place_of_input
from lora_inject.core.site import Site
from lora_inject.errors import LoRAInjectError
from lora_inject.own import own_class


class _Read:
    """A tensor that layers have read, and the moments of its vectors."""

    def __init__(self, x: Tensor, rows: Tensor, kept: Tensor) -> None:
        self.shape, self.paths = rows.shape, list[str]()
        # Rows that are made of x, such as patches, are those of one layer alone.
        view = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        self.seen = Seen(x) if view else None
        self.moments = Moments.of(kept)

    def serves(self, path: str, x: Tensor, rows: Tensor) -> bool:
        """Whether the layer at this path reads the same vectors."""
        same = self.seen is not None and self.seen.is_now(x) and rows.shape == self.shape
        return same and path not in self.paths


class Observer:
    """What is seen of layers.

    Attributes:
        mask: which tokens of the batch count; None for all.
        forward: whether a forward pass is running, and not the backward one that repeats it.
        inputs: moments by the paths of the layers that share them.
        gradients: sums of gradients, as matrices (..., out, in), by path.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = device
        self.mask: Tensor | None = None
        self.forward = False
        self.inputs: dict[frozenset[str], Moments] = {}
        self.gradients: dict[str, Tensor] = {}
        self._reads: list[_Read] = []

    def read(self, site: Site, x: Any, y: Tensor) -> None:
        """A layer has read x."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise LoRAInjectError(
                f"it reads {_named(x)} and no vectors.", path=site.path, remedy="Exclude it."
            )
        self._keep(only_gone=True)
        rows = site.kind.input_rows(site.module, x, y)
        for read in self._reads:
            if read.serves(site.path, x, rows):
                read.paths.append(site.path)
                return
        self._reads.append(_Read(x, rows, self._counted(site, x, rows)))
        self._reads[-1].paths.append(site.path)

    def changed(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """The gradient of what a layer returned has come."""
        x_NI = site.kind.input_rows(site.module, x, gradient)
        g_NO = site.kind.output_rows(site.module, gradient)
        wide = torch.promote_types(x_NI.dtype, torch.float32)
        with without_autocast(gradient.device.type):
            made = self._placed(g_NO.to(wide).mT @ x_NI.to(wide))
        known = self.gradients.get(site.path)
        self.gradients[site.path] = made if known is None else known + made

    def finish(self) -> None:
        """A batch is over."""
        self._keep(only_gone=False)

    def _counted(self, site: Site, x: Tensor, rows: Tensor) -> Tensor:
        """The vectors of the tokens that count."""
        if self.mask is None:
            return rows
        tokens, mask = x.shape[:-1], self.mask
        flat = len(tokens) == 1 and tokens.numel() == mask.numel()
        if rows.dim() != 2 or not (flat or tokens == mask.shape):
            raise LoRAInjectError(
                f"its input has the shape {tuple(x.shape)}, and the mask of its tokens "
                f"{tuple(mask.shape)}.",
                path=site.path,
                remedy="Exclude it, or count all tokens (mask=False).",
            )
        return rows[mask.reshape(-1).to(rows.device)]

    def _keep(self, only_gone: bool) -> None:
        """Add up the moments of tensors that no layer reads any more."""
        waiting = []
        for read in self._reads:
            if only_gone and read.seen is not None and not read.seen.is_gone:
                waiting.append(read)
                continue
            key, known = frozenset(read.paths), self.inputs.get(frozenset(read.paths))
            made = read.moments if self.device is None else read.moments.to(self.device)
            self.inputs[key] = made if known is None else known.plus(made)
        self._reads = waiting

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)


class _Tap(torch.autograd.Function):
    """Passes an output on, and shows its gradient with what made it; no parameter is touched."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, probe: Tensor, x: Tensor, site: Site, seen: Observer
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.site, ctx.seen = site, seen
        return y.clone()  # a view could not be written into, as activations in place do

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.seen.changed(ctx.site, *ctx.saved_tensors, gradient)
        return gradient, torch.zeros((), device=gradient.device), None, None, None


@contextmanager
def observing(
    model: nn.Module,
    sites: Sequence[Site],
    device: torch.device | str | None,
    probe: Tensor | None,
) -> Iterator[Observer]:
    """Watch layers of a model, which is in eval mode meanwhile.

    Args:
        model: the model.
        sites: the layers.
        device: where the sums are kept; None for where the layers are.
        probe: a scalar that requires a gradient, on which every output is to depend so that
            gradients come; None for inputs alone.
    """
    seen = Observer(device)
    handles: list[Any] = []
    with in_eval_mode(model.modules()):
        try:
            for site in sites:
                hook = _hook(site, seen, probe)
                handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _hook(site: Site, seen: Observer, probe: Tensor | None) -> Any:
    at, name = place_of_input(own_class(site.module))

    def hook(layer: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        x = args[at] if len(args) > at else kwargs.get(name)
        if not isinstance(y, Tensor):
            raise LoRAInjectError(
                f"it returns {_named(y)} and no tensor.", path=site.path, remedy="Exclude it."
            )
        if seen.forward:
            with torch.no_grad():
                seen.read(site, x, y)
        return None if probe is None else _Tap.apply(y, probe.to(y.device), x, site, seen)  # type: ignore[no-untyped-call]

    return hook


def _named(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} of {value.dtype}" if isinstance(value, Tensor) else f"a {kind}"
