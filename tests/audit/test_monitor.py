"""The first steps of a run are watched, told of, and then left alone."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, llama
from helpers import changed_parts, randomize_adapters, snapshot
from torch import nn

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    LoRAInjectWarning,
    inject,
    lora_parameters,
    monitor,
)


def watched(steps=3, lr=1e-3, **settings):
    model, batch = llama(), FAMILIES["llama"].inputs()
    inject(model, ["q_proj", "v_proj"], r=2, **settings)
    before = hooks(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=lr)
    return model, batch, optimizer, monitor(model, steps=steps), before


def hooks(model):
    return snapshot(model)["hooks"]


def step(model, batch, optimizer):
    model(**batch).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_sound_run_is_told_of_in_one_line_and_the_hooks_are_gone():
    model, batch, optimizer, watch, before = watched()
    assert hooks(model) != before
    for number in range(5):
        assert (watch.result is None) == (number < 3)
        step(model, batch, optimizer)
    assert watch.result.clean
    assert str(watch.result).endswith("in 3 steps: nothing found.")
    assert hooks(model) == before


def test_a_run_is_what_it_is_without_a_monitor():
    def trained(monitors):
        torch.manual_seed(0)
        model, batch = llama(), FAMILIES["llama"].inputs()
        inject(model, ["q_proj"], r=2, seed=0, dropout=0.1)
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        if monitors:
            monitor(model, steps=2)
        for _ in range(3):
            step(model, batch, optimizer)
        return snapshot(model)["state"]

    assert trained(True) == trained(False)


def test_the_module_is_named_in_which_the_first_nan_comes_up():
    model, batch, optimizer, watch, before = watched()
    step(model, batch, optimizer)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.warns(LoRAInjectWarning, match=r"model\.layers\.1\.mlp\.down_proj: NaN"):
        step(model, batch, optimizer)
    step(model, batch, optimizer)
    (found,) = [f for f in watch.result.findings if f.code == "not-finite"]
    assert (found.path, found.detail) == ("model.layers.1.mlp.down_proj", "in step 2")
    assert hooks(model) == before


def test_it_is_told_where_a_scaler_skips_the_step():
    model, batch, _, watch, _ = watched()
    model.model.norm.weight.data[0] = torch.nan
    model(**batch)
    with pytest.warns(LoRAInjectWarning, match=r"model\.norm: NaN"):
        model(**batch)
    watch.stop()


def test_adapters_whose_b_has_not_moved_are_named():
    model, batch, optimizer, watch, _ = watched()
    held = model.model.layers[0].self_attn.q_proj.lora_B
    optimizer.param_groups[0]["params"] = [p for p in lora_parameters(model) if p is not held]
    step(model, batch, optimizer)
    step(model, batch, optimizer)
    with pytest.warns(LoRAInjectWarning, match="unmoved"):
        step(model, batch, optimizer)
    assert [f.path for f in watch.result.findings] == ["model.layers.0.self_attn.q_proj.lora_B"]


def test_updates_out_of_proportion_are_named():
    model, batch, optimizer, watch, _ = watched(steps=1)
    randomize_adapters(model, 10)
    with pytest.warns(LoRAInjectWarning, match="update-large"):
        step(model, batch, optimizer)
    assert watch.result.codes == ("update-large",)


def test_steps_of_other_optimizers_do_not_count():
    model, batch, optimizer, watch, _ = watched(steps=2)
    other = nn.Linear(2, 2)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        other(torch.ones(1, 2)).sum().backward()
        theirs.step()
    assert watch.result is None
    step(model, batch, optimizer)
    step(model, batch, optimizer)
    assert watch.result.clean


def test_it_can_be_stopped_and_copies_are_not_watched():
    model, batch, optimizer, watch, before = watched()
    copied = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    for other in (copied, loaded):
        other(**batch)
    watch.stop()
    watch.stop()
    assert hooks(model) == before
    assert str(watch.result).endswith("in 0 steps: nothing found.")
    step(model, batch, optimizer)


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(LoRAInjectError, match="no adapters"):
        monitor(llama())
    model, *_ = watched()
    with pytest.raises(ArgumentError, match="steps"):
        monitor(model, steps=0)
    assert changed_parts(snapshot(model), snapshot(model)) == []
