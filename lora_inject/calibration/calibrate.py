"""``calibrate``: one pass over batches, and what a model's layers were seen to read and to want."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.calibration.observing import Observer, observing
from lora_inject.calibration.statistics import Layer, Paths, Statistics, joined
from lora_inject.compat.marks import is_encoder_decoder
from lora_inject.core.matcher import Matcher
from lora_inject.core.patterns import parse
from lora_inject.core.site import Site
from lora_inject.errors import ArgumentError, LoRAInjectError, UnsupportedLayerError
from lora_inject.plan import plan
from lora_inject.printing.progress import tracked
from lora_inject.starts.default import matrix_shape

Mask = str | bool | Callable[[Any], Tensor] | None


def calibrate(
    model: nn.Module,
    targets: Any,
    batches: Iterable[Any],
    *,
    exclude: Any = (),
    layers: Any = None,
    mask: Mask = None,
    gradients: bool = False,
    loss: Callable[[Any, Any], Tensor] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Statistics:
    """See what layers of a model read in one pass over batches; the model is not changed.

    The moments are exact, whatever the order of batches: for each distinct input of I features
    their number, their mean and (I, I) squares about it, in float32 (of float64 inputs in float64).
    The model runs in eval mode, on batches that are on its device.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> stats = calibrate(model, "all-linear", [torch.randn(8, 4) for _ in range(3)])
        >>> stats.inputs_of("0").count
        24
        >>> targets = allocate(stats, r=2)  # ranks by what the inputs vary in
        >>> print(inject(model, targets, init=EVA(stats)))  # doctest: +SKIP

    Args:
        model: any ``nn.Module``.
        targets: the layers to watch, as in ``inject``: Linear-like ones and small convolutions,
            which see patches.
        batches: what the forward reads: mappings of its arguments, tuples of them, or tensors.
        exclude: layers to leave alone, as in ``inject``.
        layers: block indices to keep, as in ``inject``.
        mask: which tokens count: the name of an entry of each batch, or a function of a batch that
            returns a mask in the shape of the tokens (batch, sequence). None takes an entry
            ``"attention_mask"`` of two dimensions where there is one; False counts all.
        gradients: whether to take gradients of the weights too, which LoRA-GA starts from: (out,
            in) in float32 for each layer, as long as an adapter refers to the statistics. Its
            directions cannot be told from less in one pass; ``device="cpu"`` keeps them elsewhere.
        loss: a function of what the model returned and the batch; None for the output's ``loss``.
        device: where the sums are kept; None for the device of each layer.
        progress: whether a progress bar is shown, on standard error.

    Returns:
        The statistics, for the starts ``EVA``, ``CorDA`` and ``LoRAGA`` and for ``allocate``.

    Raises:
        ArgumentError: an argument cannot be used, or there are no batches.
        NoMatchError: a pattern selects nothing.
        UnsupportedLayerError: the inputs of a layer are not vectors that are known.
        LoRAInjectError: a layer was never called, or read something that is not finite.
    """
    if loss is not None and not gradients:
        raise ArgumentError("loss is for gradients=True alone.")
    planned = plan(model, targets, r=1, exclude=exclude, layers=layers, adapter=_NOBODY)
    sites = [site for site in planned.sites if not site.follows]
    for site in sites:
        if wrong := site.kind.rows_refusal(site.module):
            raise UnsupportedLayerError(wrong, path=site.path, remedy="Exclude it.")
    seen, number = _watched(model, sites, batches, mask, gradients, loss, device, progress)
    matcher = Matcher(planned.look)
    known = {site.path: _layer(matcher, site) for site in sites}
    inputs: dict[Paths, Any] = {tuple(sorted(paths)): m for paths, m in seen.inputs.items()}
    sums = {path: seen.gradients[path] for path in known if path in seen.gradients}
    stats = Statistics(known, joined(inputs, [*known]), sums, number)
    _require_seen(stats, gradients)
    return stats


_NOBODY = "_calibration"  # an adapter that the plan is for, and that nobody gets


def _watched(
    model: nn.Module, sites: list[Site], batches: Iterable[Any], mask: Mask, gradients: bool,
    loss: Any, device: Any, progress: bool,
) -> tuple[Observer, int]:  # fmt: skip
    """What was seen, and of how many batches."""
    probe = torch.zeros((), requires_grad=True) if gradients else None
    number = 0
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        observing(model, sites, device, probe) as seen,
    ):
        for batch in tracked(batches, "calibrating", progress):
            seen.mask, seen.forward = _mask(model, batch, mask), True
            output = called(model, batch)
            seen.forward = False
            if probe is not None:
                _backward(output, batch, loss, probe)
            del output
            seen.finish()
            number += 1
    if not number:
        raise ArgumentError("batches: there were none.")
    return seen, number


def called(model: nn.Module, batch: Any) -> Any:
    """What a model returns for a batch: a mapping of arguments, a tuple of them, or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _backward(output: Any, batch: Any, loss: Any, probe: Tensor) -> None:
    """Let the gradients of all outputs come; no ``.grad`` is written."""
    value = getattr(output, "loss", None) if loss is None else loss(output, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ArgumentError(
            "loss: the model returned no loss, or more than one number.",
            remedy="Put labels into the batches, or give loss=lambda output, batch: ...",
        )
    if not value.requires_grad:
        raise ArgumentError("loss: it does not depend on the layers.")
    torch.autograd.grad(value.reshape(()), probe)


def _mask(model: nn.Module, batch: Any, mask: Mask) -> Tensor | None:
    """Which tokens of a batch count, or None for all."""
    if mask is False:
        return None
    if mask is None:
        found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        found = found if isinstance(found, Tensor) and found.dim() == 2 else None
    elif callable(mask):
        found = mask(batch)
    elif isinstance(mask, str) and isinstance(batch, Mapping) and mask in batch:
        found = batch[mask]
    else:
        raise ArgumentError(f"mask: {mask!r} is no entry of a batch, and no function of it.")
    if found is None:
        return None
    if not isinstance(found, Tensor):
        raise ArgumentError(f"mask must be a tensor, not a {type(found).__name__}.")
    if bool(found.all()):
        return None
    if mask is None and is_encoder_decoder(model):
        raise ArgumentError(
            "mask: the model has an encoder and a decoder, and attention_mask is of the tokens of "
            "one of them.",
            remedy="Calibrate each in a call of its own, with mask= of its tokens and init= by "
            "pattern, or count all tokens (mask=False).",
        )
    return found.bool()


def _layer(matcher: Matcher, site: Site) -> Layer:
    """What ``allocate`` has to know of a layer, of its site of rank 1."""
    import regex  # as in core.patterns

    selected = matcher.targets_of(parse(site.path, "targets")[0]) if site.path else ()
    alone = len(selected) == 1 and not set(site.path) & set("*?[")
    pattern = site.path if alone else f"re:{regex.escape(site.path) or '(?:)'}"
    sides = [min(matrix_shape(site.kind, site.module, spec)) for spec in site.specs]
    most = max(1, min(*sides, site.base_elements // site.parameters))
    return Layer(pattern, site.parameters, most)


def _require_seen(stats: Statistics, gradients: bool) -> None:
    for path in stats.layers:
        moments = stats.inputs_of(path)
        if moments is None or not moments.count:
            raise LoRAInjectError(
                "it was never called, or with no tokens that count.",
                path=path,
                remedy="Exclude it, or give batches that reach it.",
            )
        gradient = stats.gradient_of(path)
        if gradients and gradient is None:
            raise LoRAInjectError(
                "the loss does not depend on it.", path=path, remedy="Exclude it."
            )
        if not moments.is_finite or not (gradient is None or bool(gradient.isfinite().all())):
            raise LoRAInjectError(
                "what it read or its gradient was not finite.",
                path=path,
                remedy="Look for NaN in the model or in the batches.",
            )
