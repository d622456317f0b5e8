"""What ran is what is recomputed: whatever is in use by the time of the backward pass."""

import contextlib
import gc
import weakref

import pytest
import torch
from families import llama
from helpers import changed_parts, checkpoint_blocks, ids, randomize_adapters, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_inject import LoRAInjectError, disabled, inject, merge, per_row, remove, strip, use
from lora_inject.compat import torch_private

pytestmark = [
    pytest.mark.usefixtures("device"),
    # Of a part inside of another in the reentrant form, whose first pass has no gradients.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


class Own(nn.Module):
    """A model that checkpoints its blocks itself, some of them inside of each other."""

    def __init__(self):
        super().__init__()
        parts = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)]
        self.blocks = nn.ModuleList(parts)
        self.reentrant = None
        self.between = contextlib.nullcontext

    def run(self, function, x):
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def both(self, x):
        y = self.run(self.blocks[1], x)
        with self.between():
            z = self.blocks[2](y)
        return self.run(self.blocks[2], y) + z

    def forward(self, x):
        return self.run(self.both, self.run(self.blocks[0], x))


class InFamily(nn.Module):
    """A model of transformers behind the same attribute."""

    def __init__(self):
        super().__init__()
        self.inner = llama()

    def forward(self, x):
        return self.inner(input_ids=x, use_cache=False).logits


def own(reentrant):
    model = Own()
    model.reentrant = reentrant
    return model, torch.randn(2, 6, dtype=torch.double, requires_grad=True), ["0", "2"]


def family(reentrant):
    model = InFamily()
    if reentrant is not None:
        checkpoint_blocks(model.inner, reentrant)
    return model, ids(), ["q_proj", "down_proj"]


MODELS = pytest.mark.parametrize("build", [own, family])


def built(build, reentrant, **options):
    torch.manual_seed(0)
    model, x, targets = build(reentrant)
    inject(model.double().train(), targets, r=2, adapter="a", **options)
    use(model)
    inject(model, targets, r=2, adapter="b", **options)
    randomize_adapters(model)
    return model, x


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def two_in_turn(model, forward, backward):
    losses = []
    for name in ("a", "b"):
        use(model, name, train=["a", "b"])
        losses.append(forward())
    backward(sum(losses))


def two_weights(model, forward, backward):
    losses = []
    for weights in ({"a": 0.5, "b": 2.0}, {"a": 1.0}):
        use(model, weights, train=["a", "b"])
        losses.append(forward())
    backward(sum(losses))


def rows_then_one(model, forward, backward):
    use(model, "a", "b")
    with per_row(model, ["a", "b"]):
        loss = forward()
    with per_row(model, ["b", None]):
        loss = loss + forward()
    backward(loss + forward())


def rows_then_none(model, forward, backward):
    use(model, train=["a", "b"])
    with per_row(model, ["a", "b"]):
        loss = forward()
    backward(loss)


def then_none(model, forward, backward):
    use(model, "a")
    loss = forward()
    use(model, train=["a"])
    backward(loss)


def then_disabled(model, forward, backward):
    use(model, "a")
    loss = forward()
    with disabled(model):
        backward(loss)


def with_a_reference(model, forward, backward):
    use(model, "a")
    loss = forward()
    with disabled(model), torch.no_grad():
        reference = forward()
    backward(loss * reference)


def disabled_inside(model, forward, backward):
    use(model, "a")
    if isinstance(model, Own):
        model.between = lambda: disabled(model)
    loss = forward()
    use(model, "b", train=["a", "b"])
    backward(loss + forward())


def rows_inside(model, forward, backward):
    use(model, "a", "b")
    if isinstance(model, Own):
        model.between = lambda: per_row(model, ["a", "b"])
    loss = forward()
    use(model, "b", train=["a", "b"])
    backward(loss)


SCENES = [two_in_turn, two_weights, rows_then_one, rows_then_none, then_none, then_disabled,
          with_a_reference, disabled_inside, rows_inside]  # fmt: skip


def assert_as_without_checkpointing(scene, build, reentrant, **options):
    found = []
    for form in (None, reentrant):
        model, x = built(build, form, **options)
        after = []

        def backward(loss, model=model, after=after):
            before = snapshot(model)
            loss.backward()
            got = snapshot(model)
            after.append([part for part in changed_parts(before, got) if part != "gradients"])

        scene(model, lambda model=model, x=x: model(x).pow(2).sum(), backward)
        assert after == [[]]
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() != set()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("scene", SCENES)
@MODELS
@REENTRANT
def test_a_part_runs_again_with_what_it_ran_with(scene, build, reentrant):
    assert_as_without_checkpointing(scene, build, reentrant)


@pytest.mark.parametrize("scene", [two_in_turn, then_none, then_disabled, with_a_reference])
@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"how": "weight"}])
@REENTRANT
def test_so_do_trained_biases_and_adapters_in_the_weight(scene, options, reentrant):
    assert_as_without_checkpointing(scene, own, reentrant, **options)


@pytest.mark.parametrize("change", [merge, strip, lambda m: remove(m, "a")])
@MODELS
@REENTRANT
def test_what_cannot_be_shown_again_is_refused_by_path(change, build, reentrant):
    model, x = built(build, reentrant)
    use(model, "a")
    loss = model(x).sum()
    change(model)
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match=r"(blocks|layers)\.\d.*put on, taken off or merged"):
        loss.backward()
    assert changed_parts(before, snapshot(model)) == []


@REENTRANT
def test_an_adapter_that_runs_in_the_second_pass_alone_is_refused_by_path(reentrant):
    model, x = built(own, reentrant)
    with disabled(model):
        loss = model(x).sum()
    with pytest.raises(LoRAInjectError, match=r"blocks\.\d\.\d.*none did when it was"):
        loss.backward()
    with disabled(model):
        model(x).sum().backward()
    assert x.grad is not None


@MODELS
@REENTRANT
def test_what_is_done_to_another_model_is_no_matter(build, reentrant):
    model, x = built(build, reentrant)
    loss = model(x).sum()
    other, _ = built(build, reentrant)
    strip(other)
    loss.backward()
    assert gradients(model)


@REENTRANT
def test_nothing_is_kept_of_former_moments_without_a_graph(reentrant):
    model, x = built(own, reentrant)
    loss = model(x).sum()
    use(model, "a")
    gone = weakref.ref(model)
    loss.backward()
    del loss, model
    gc.collect()
    assert gone() is None


def test_a_plain_forward_does_not_walk_the_stack(monkeypatch):
    def walks():
        raise AssertionError

    model, x = built(own, None)
    monkeypatch.setattr("lora_inject.core.recomputing.checkpointed_parts", walks)
    model(x).sum().backward()
    with torch.no_grad():
        model.eval()(x)


def test_the_parts_on_the_stack_are_found_in_both_forms_and_in_each_other():
    found = []

    def inner(x):
        found.append([part.runs_again for part in torch_private.checkpointed_parts()])
        return x * x

    for outer in (True, False):
        x = torch.randn(3, requires_grad=True)
        found.clear()
        checkpoint(
            lambda x: checkpoint(inner, x * x, use_reentrant=False), x, use_reentrant=outer
        ).sum().backward()
        assert found[0] == [False, False]
        assert found[1][-1] is True
    assert list(torch_private.checkpointed_parts()) == []
