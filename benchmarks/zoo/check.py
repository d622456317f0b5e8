"""One model of the zoo: every layer adapted, compared with formulas, merged, trained and stripped.

What adapters do to the model is compared with what it computes from weights W + s B A, and each
pair's gradients with the gradient of that weight.
"""

import re
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.zoo.compare import CLOSE, is_close, is_equal, outputs_frozen, outputs_of, snapshot
from benchmarks.zoo.models import Small
from lora_inject import disabled, inject, lora_parameters, merge, plan, strip, unmerge
from lora_inject.core.adapter import Adapter, Pair
from lora_inject.core.state import adapters_of
from lora_inject.errors import LoRAInjectError, LoRAInjectWarning, UnsupportedLayerError
from lora_inject.kinds import find_kind

RANK = 2
VANISHING = 1e-7  # beside the largest of a model: rounding is all of it then


class Place(NamedTuple):
    """A pair on a layer."""

    layer: nn.Module
    adapter: Adapter
    pair: Pair

    @property
    def is_computed(self) -> bool:
        """Whether its weight is normed, say, so that nothing can be added to it by hand."""
        return self.pair.spec.weight not in self.layer._parameters

    @property
    def weight(self) -> Tensor:
        """The weight that it is for; of one that is computed a tensor that it is computed from."""
        return self.adapter.kind.weight(self.layer, self.pair.spec.weight)

    def update(self) -> Tensor:
        """The update s B A in the shape of the weight; nothing for one that is computed."""
        if self.is_computed:
            return torch.zeros_like(self.weight)
        A, B = (tensor.detach() for tensor in self.pair.tensors(self.layer).values())
        kind, spec = self.adapter.kind, self.pair.spec
        return self.adapter.settings.scaling * kind.update(self.layer, self.weight, spec, A, B)


def comparable(small: Small) -> Small:
    """The model in double precision, where it runs so: what differs is no rounding then.

    Raises:
        ValueError: it cannot be compared with itself.
    """
    model = small.model.double()
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in small.inputs.items()
    }
    try:
        outputs_of(model, inputs, backward=True)
    except Exception:
        model, inputs = model.float(), small.inputs
    expected = outputs_of(model, inputs)
    outputs_of(model, inputs, backward=True)
    outputs_of(model, inputs, backward=True)  # some keep a graph, and have no second one
    model.zero_grad()
    if not is_equal(expected, outputs_of(model, inputs)):
        raise ValueError("two forward passes of it differ")
    if not all(tensor.isfinite().any() for tensor in expected):
        raise ValueError("its outputs are not finite")
    return Small(model, inputs)


def check(small: Small) -> dict[str, Any]:
    """Adapt all of a comparable model, and count what is wrong.

    Returns:
        For JSON: the number of "pairs", by "kinds" of layers, those that are "idle" (their weight
        has no gradient either), "dead", "wrong" (in outputs or gradients), "wrong after merge" and
        "wrong after strip", the layers "merged", the "refused" by reason, "warnings", and "said":
        what is wrong, in words.
    """
    model, inputs = small
    found: dict[str, Any] = {"said": []}
    expected, frozen = outputs_of(model, inputs), outputs_frozen(model, inputs)
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoRAInjectWarning)
        found["refused"] = _adapt(model)
        places = _places(model)
        found["pairs"] = len(places)
        found["kinds"] = Counter(place.adapter.kind.name for place in places)
        if not is_equal(frozen, outputs_of(model, inputs)):
            found["said"].append("inject changed an output")
        _randomize(places)
        _compare(small, places, expected, found)
        _train(small)
        strip(model)
    after = snapshot(model)
    others = [part for part in before if before[part] != after[part]]
    others += [] if is_equal(expected, outputs_of(model, inputs)) else ["outputs"]
    found["wrong after strip"] = len(places) if others else 0
    found["said"] += [f"strip left other {', '.join(others)}"] if others else []
    texts = [str(w.message) for w in caught if issubclass(w.category, LoRAInjectWarning)]
    found["warnings"] = sorted(set(texts))
    return found


def _adapt(model: nn.Module) -> dict[str, int]:
    """Adapt all layers and fused weights; what is refused is counted by reason."""
    refused: dict[str, str] = {}

    fused = _fused(model)

    def wanted(path: str, module: nn.Module) -> bool:
        return path not in refused and find_kind(module) is not None

    while True:
        try:
            targets = [wanted, *(f"re:{re.escape(p)}" for p in fused if p not in refused)]
            inject(model, targets, r=RANK, alpha=2 * RANK, seed=0)
            return dict(Counter(refused.values()))
        except UnsupportedLayerError as error:
            if not error.path or error.path in refused:
                raise
            reason = str(error).splitlines()[0].removeprefix(f"{error.path}: ")
            refused[error.path] = reason[:160]


def _fused(model: nn.Module) -> list[str]:
    """The paths of fused weights, such as those of experts, whose layout is known."""
    try:
        skipped = plan(model).skipped
    except LoRAInjectError:
        return []
    found = [skip for skip in skipped if skip.reason.startswith("a fused weight")]
    return [skip.path for skip in found if "layout=" not in skip.reason]


def _places(model: nn.Module) -> list[Place]:
    """Every pair; of a tied weight the one that has the tensors."""
    return [
        Place(module, adapter, pair)
        for module in model.modules()
        for adapter in adapters_of(module)
        if not adapter.follows
        for pair in adapter.pairs
    ]


def _randomize(places: list[Place]) -> None:
    """Give A and B values with which each changes its weight by about a tenth.

    Those on computed weights stay as they start, and add nothing; so does the row of padding,
    which never trains.
    """
    torch.manual_seed(2)
    with torch.no_grad():
        for place in places:
            if place.is_computed:
                continue
            for tensor in place.pair.tensors(place.layer).values():
                tensor.normal_()
            if (padding := getattr(place.layer, "padding_idx", None)) is not None:
                place.pair.tensors(place.layer)["A"][:, padding] = 0
            ratio = 0.1 * place.weight.norm() / place.update().norm().clamp_min(1e-9)
            for tensor in place.pair.tensors(place.layer).values():
                tensor.mul_(ratio.clamp_min(1e-3).sqrt())


def _compare(small: Small, places: list[Place], base: list[Tensor], found: dict[str, Any]) -> None:
    """Compare outputs and gradients with those of W + s B A, then what is merged with both."""
    model, inputs = small
    outputs = outputs_of(model, inputs, backward=True)
    got = [[tensor.grad for tensor in place.pair.tensors(place.layer).values()] for place in places]
    reference, gradients, updates = _by_formula(small, places)
    counts = Counter({"idle": 0, "dead": 0, "wrong": 0, "wrong after merge": 0})
    sizes = [
        0.0 if G is None else float(G.norm() * D.norm())
        for G, D in zip(gradients, updates, strict=True)
    ]
    for place, own, G, D in zip(places, got, gradients, updates, strict=True):
        counts[_judged(place, own, G, D, VANISHING * max(sizes))] += 1
    if not is_close(outputs, reference, base):
        found["said"].append("outputs differ from those of W + s B A")
        counts["wrong"] = len(places)
    layers = dict.fromkeys(place.layer for place in places)
    found["merged"] = sum(_is_merged(layer) for layer in layers)
    if found["merged"]:
        if not is_close(outputs_of(model, inputs), reference, base):
            found["said"].append("merged outputs differ from those of W + s B A")
            counts["wrong after merge"] = len(places)
        unmerge(model)
    counts.pop("right", None)
    found.update(counts)


def _is_merged(layer: nn.Module) -> bool:
    """Merge into a layer, unless its weight is tied or computed: its adapter goes on beside it."""
    try:
        merge(layer)
    except UnsupportedLayerError:
        return False
    return True


def _by_formula(
    small: Small, places: list[Place]
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Outputs of the model with weights W + s B A, their gradients, and the updates."""
    model, inputs = small
    updates = [place.update() for place in places]
    with disabled(model):
        weights = [place.weight for place in places]
        flags = [weight.requires_grad for weight in weights]
        former = [weight.detach().clone() for weight in weights]
        try:
            for weight, update in zip(weights, updates, strict=True):
                weight.data += update
                weight.requires_grad_(True)
            outputs = outputs_of(model, inputs, backward=True)
            gradients = [weight.grad for weight in weights]
        finally:
            for weight, value, flag in zip(weights, former, flags, strict=True):
                weight.data, weight.grad = value, None
                weight.requires_grad_(flag)
    return outputs, gradients, updates


def _judged(
    place: Place, own: list[Tensor | None], G: Tensor | None, D: Tensor, least: float
) -> str:
    """Whether the gradients of A and B are those that the gradient G of W + D makes."""
    if G is None or not G.any() or (D.any() and G.norm() * D.norm() <= least):
        return "idle"
    alive = [tensor for tensor in own if tensor is not None and tensor.any()]
    if not alive or place.is_computed:
        return "right" if alive else "dead"
    # For A and for B alike, what they are times their gradient is D times that of the weight.
    wanted, size = (G * D).sum(), G.norm() * D.norm()
    for tensor, gradient in zip(place.pair.tensors(place.layer).values(), own, strict=True):
        if gradient is None or abs((tensor * gradient).sum() - wanted) > CLOSE * size:
            return "wrong"
    return "right"


def _train(small: Small) -> None:
    """A step of training, in training mode."""
    model, inputs = small
    model.train()
    parameters = lora_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    with suppress(Exception):  # many want labels then, or more rows for a norm
        outputs_of(model, inputs, backward=True)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
