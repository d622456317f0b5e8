"""The dropouts of adapters are where tools look for dropout, and stand for what the layer does."""

import copy
import io

import pytest
import torch
from families import FAMILIES
from helpers import changed_parts, randomize_adapters, raw, snapshot
from torch import nn

from lora_inject import disabled, inject, lora_state_dict, merge, per_row, remove, strip, unmerge
from lora_inject.core.dropping import LoRADropout
from lora_inject.errors import UnsupportedLayerError

pytestmark = pytest.mark.usefixtures("device")
DROPS = [0.5, {"rank": 0.5}, {"module": 0.5}, {"input": 0.3, "rank": 0.3, "module": 0.3}]


def adapted(dropout=0.5, family="llama", **settings):
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    inject(model, "all-linear", r=4, dropout=dropout, seed=0, **settings)
    randomize_adapters(model)
    return model.train()


def outputs(model, inputs):
    return model(**inputs)[0]


def differ(model, family="llama"):
    """Whether two of a few forwards on one batch differ."""
    inputs = FAMILIES[family].inputs()
    first = outputs(model, inputs)
    return any(not torch.equal(outputs(model, inputs), first) for _ in range(5))


def children(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRADropout)}


def switch_off(model):
    """What trainers do with the dropout of a model (TRL's disable_dropout_in_model)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_what_switches_dropout_off_in_a_model_reaches_its_adapters(family):
    model = adapted(family=family)
    assert differ(model, family)
    switch_off(model)
    assert not differ(model, family)
    inputs = FAMILIES[family].inputs()
    torch.testing.assert_close(outputs(model, inputs), outputs(model.eval(), inputs))


@pytest.mark.parametrize("dropout", DROPS)
@pytest.mark.parametrize("how", [{}, {"variant": "dora"}, {"init": "pissa"}])
def test_all_dropouts_of_adapters_are_reached(dropout, how):
    model = adapted(dropout, **how)
    kinds = len(dropout) if isinstance(dropout, dict) else 1
    layers = [m for m in model.modules() if type(m).__name__ == "LoRALinear"]
    assert len(children(model)) == kinds * len(layers)
    assert differ(model)
    switch_off(model)
    assert not differ(model)


def test_an_adapter_without_dropout_has_no_child():
    assert children(adapted(0.0)) == {}


def test_what_is_printed_says_what_is_in_force():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", r=2, dropout={"input": 0.5, "rank": 0.25})
    model[0].lora_dropout.p = 0.125
    assert "dropout=0.125, rank dropout 0.25" in repr(model)
    assert "LoRADropout" not in repr(model)


def test_a_probability_that_is_set_is_in_force():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    inject(model, "0", r=2, dropout=0.9)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].lora_A.fill_(1.0)
        model[0].lora_B.fill_(1.0)
    model[0].lora_dropout.p = 0.25
    kept = (model(torch.eye(64))[:, 0] != 0).float().mean()
    assert 0.5 < kept < 1.0


def test_the_mode_of_the_dropout_counts():
    """As where dropout is on in evaluation, to sample from a model."""
    model = adapted().eval()
    assert not differ(model)
    for module in children(model).values():
        module.train()
    assert differ(model)
    model.train().eval()
    assert not differ(model)


@pytest.mark.parametrize("training", [True, False])
def test_it_has_the_mode_of_its_layer(training):
    model = nn.Sequential(nn.Linear(4, 4)).train(training)
    inject(model, "0", r=2, dropout=0.5)
    assert model[0].lora_dropout.training is training


def test_strip_takes_it_out_and_no_key_has_changed():
    model = FAMILIES["llama"].build()
    before = snapshot(model)
    inject(model, "all-linear", r=2, dropout={"input": 0.1, "rank": 0.1})
    assert not any("dropout" in key for key in [*model.state_dict(), *lora_state_dict(model)])
    model.load_state_dict(model.state_dict())
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_each_adapter_has_its_own():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", r=2, dropout=0.5)
    inject(model, "0", r=2, dropout={"module": 0.25}, adapter="fr")
    inject(model, "0", r=2, adapter="de")
    names = {name: child.p for name, child in model[0].named_children()}
    assert names == {"lora_dropout": 0.5, "lora_module_dropout_fr": 0.25}
    model[0].lora_dropout.p = 0.0
    kept = model[0].lora_dropout
    remove(model, "fr")
    assert dict(model[0].named_children()) == {"lora_dropout": kept}
    assert kept.p == 0.0


def test_what_was_set_holds_through_disabled_merge_and_copies():
    model = adapted()
    switch_off(model)
    with disabled(model):
        pass
    merge(model)
    unmerge(model)
    assert not differ(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert not differ(other)
        next(iter(children(other).values())).p = 0.5
        assert differ(other)
        strip(other)
        assert children(other) == {}
    assert not differ(model)


def test_it_is_switched_off_while_nothing_runs():
    model = adapted()
    with disabled(model):
        switch_off(model)
    assert not differ(model)


def test_rows_of_a_batch_drop_as_the_children_say():
    model = adapted()
    inject(model, "all-linear", r=2, dropout=0.5, adapter="fr")
    randomize_adapters(model)
    inputs = {k: v[:2] for k, v in FAMILIES["llama"].inputs().items()}
    with per_row(model, ["default", "fr"]):
        ys = [model(**inputs)[0] for _ in range(2)]
        assert not torch.equal(*ys)
        switch_off(model)
        ys = [model(**inputs)[0] for _ in range(2)]
        assert torch.equal(*ys)


def test_a_child_that_somebody_replaced_drops_nothing():
    model = adapted()
    for path in children(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    assert not differ(model)


def test_with_a_seed_the_values_are_those_of_the_probability_that_was_asked_for():
    model, other = adapted(0.5), adapted(0.25)
    for child in children(other).values():
        child.p = 0.5
    inputs = FAMILIES["llama"].inputs()
    torch.manual_seed(3)
    y = outputs(model, inputs)
    torch.manual_seed(3)
    assert raw(outputs(other, inputs)) == raw(y)


def test_a_layer_with_a_child_or_attribute_of_that_name_is_refused_and_keeps_it():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.lora_dropout_fr, self.lora_rank_dropout = nn.Dropout(0.9), 0.9

    model = nn.Sequential(Own())
    before = snapshot(model)
    for dropout, adapter in ((0.5, "fr"), ({"rank": 0.5}, "default")):
        with pytest.raises(UnsupportedLayerError, match=r"attribute lora_.*dropout.* of its own"):
            inject(model, "0", r=2, dropout=dropout, adapter=adapter)
    assert not changed_parts(before, snapshot(model))
    inject(model, "0", r=2, adapter="fr")  # which drops nothing
    inject(model, "0", r=2, dropout=0.5)
    strip(model)
    assert model[0].lora_dropout_fr.p == 0.9
    assert model[0].lora_rank_dropout == 0.9


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("dropout", DROPS)
def test_a_probability_of_1_drops_all_of_the_adapter(dropout, init):
    layers = [nn.Linear(6, 5), nn.Linear(256, 128), nn.Conv1d(4, 6, 1), nn.Embedding(9, 4)]
    inputs = [torch.randn(4, 6), torch.randn(256, 256), torch.randn(2, 4, 3), torch.arange(9)]
    reads_ids = init == "default"  # a start that is subtracted has no input to drop there
    for layer, x in [*zip(layers, inputs, strict=True)][: 4 if reads_ids else 3]:
        model = nn.Sequential(layer)
        before = model(x)
        inject(model, "0", r=2, dropout=dropout, init=init)
        randomize_adapters(model)
        for child in children(model).values():
            child.p = 1.0
        y = model(x)
        assert torch.equal(y, before)
        y.square().sum().backward()
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("silent", ["default", "fr"])
def test_each_row_drops_as_the_child_of_its_own_adapter_says_now(silent):
    model = nn.Sequential(nn.Linear(64, 64))
    for adapter in ("default", "fr"):
        inject(model, "0", r=4, dropout=0.5, adapter=adapter)
    randomize_adapters(model, names=["default", "fr"])
    model[0].get_submodule("lora_dropout" + ("_fr" if silent == "fr" else "")).p = 0.0
    with per_row(model, ["default", "fr"]):
        x = torch.randn(2, 64)
        first, second = model(x), model(x)
        rows = [bool(torch.equal(a, b)) for a, b in zip(first, second, strict=True)]
        assert rows == [silent == "default", silent == "fr"]
        model.eval()
        assert torch.equal(model(x), model(x))
        assert not torch.equal(model.train()(x), model(x))
