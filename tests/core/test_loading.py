"""A base loaded under adapters is the base from then on; merged weights say what they are."""

import copy
import io

import pytest
import torch
from helpers import Net, randomize_adapters, snapshot
from torch import nn

from lora_inject import (
    FormatError,
    LoRAInjectError,
    disabled,
    inject,
    lora_parameters,
    merge,
    merged,
    strip,
    unmerge,
    use,
)

X = torch.arange(10).view(2, 5)


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def base_dict():
    return net(1).state_dict()


def inject_all(model, **options):
    inject(model, ["q_proj"], r=2, bias="all", train_also=["head"], **options)
    return model


def train(model):
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1)


# When a base may be loaded: what is done before, and around it.
def at_once(model, load):
    load()


def while_disabled(model, load):
    with disabled(model):
        load()


def with_none_in_use(model, load):
    use(model)
    load()
    use(model, "default")


def with_another_in_use(model, load):
    use(model, "b")
    load()
    use(model, "default")


TIMES = [at_once, while_disabled, with_none_in_use, with_another_in_use]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("time", TIMES)
def test_what_is_loaded_is_the_base_for_strip_and_disabled(time, trained, assign):
    model = inject_all(net())
    if time is with_another_in_use:
        inject(model, ["v_proj"], r=2, adapter="b")
        use(model, "default")
    randomize_adapters(model)
    if trained:
        train(model)
    own = [p.detach().clone() for p in lora_parameters(model)]
    time(model, lambda: model.load_state_dict(base_dict(), strict=False, assign=assign))
    with disabled(model):
        assert torch.equal(model(X), net(1)(X))
    if trained:  # nothing that was trained is lost
        assert all(torch.equal(a, b) for a, b in zip(own, lora_parameters(model), strict=True))
    else:  # and what was not trained follows the base
        assert torch.equal(model.head.weight, net(1).head.weight)
    strip(model)
    assert snapshot(model)["state"] == snapshot(net(1))["state"]


def test_a_state_dict_with_adapters_is_none_of_a_base():
    model = inject_all(net())
    train(model)
    saved = copy.deepcopy(model.state_dict())
    other = inject_all(net())
    other.load_state_dict(saved)
    assert torch.equal(other(X), model(X))
    strip(other)
    assert torch.equal(other(X), net()(X))


def test_a_base_loaded_from_the_outside_of_what_was_adapted():
    model = nn.Sequential(inject_all(net()))
    train(model)
    model.load_state_dict(nn.Sequential(net(1)).state_dict(), strict=False)
    strip(model)
    assert torch.equal(model(X), net(1)(X))


def test_parts_and_the_whole_settle_a_load_once():
    model = net()
    inject(model.layers[0], ["q_proj"], r=2, bias="all")
    inject(model, ["v_proj"], r=2, train_also=["head"], adapter="b")
    train(model)
    model.load_state_dict(base_dict(), strict=False)
    strip(model)
    assert torch.equal(model(X), net(1)(X))


def test_copies_do_it_too():
    model = inject_all(net())
    train(model)
    other = copy.deepcopy(model)
    other.load_state_dict(base_dict(), strict=False)
    assert torch.equal(strip(other)(X), net(1)(X))
    assert torch.equal(strip(model)(X), net()(X))


# --- merged -------------------------------------------------------------------------------------


def merged_net():
    model = inject_all(net())
    randomize_adapters(model)
    merge(model)
    return model


def test_merged_weights_are_refused_where_they_would_count_twice():
    saved = io.BytesIO()
    torch.save(merged_net().state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    for model in (inject_all(net()), nn.Sequential(inject_all(net()))):
        if isinstance(model, nn.Sequential):
            state = nn.Sequential(merged_net()).state_dict()
        before = snapshot(model)
        with pytest.raises(FormatError, match="has an adapter merged into it, which would count"):
            model.load_state_dict(state)
        assert snapshot(model) == before


def test_merged_weights_fit_where_the_same_are_merged_and_a_plain_model():
    state = merged_net().state_dict()
    model = merged_net()
    model.load_state_dict(state)
    plain = net()
    plain.load_state_dict(state, strict=False)
    assert torch.equal(model(X), plain(X))
    unmerge(model)
    assert torch.equal(strip(model)(X), net()(X))


def test_a_base_under_a_merged_adapter_is_refused():
    model, before = merged_net(), snapshot(merged_net())["state"]
    for load in (at_once, while_disabled):
        with pytest.raises(FormatError, match=r"would be lost.*unmerge first"):
            load(model, lambda: model.load_state_dict(base_dict(), strict=False))
    assert snapshot(model)["state"] == before
    unmerge(model)
    model.load_state_dict(base_dict(), strict=False)
    merge(model)
    assert torch.equal(strip(unmerge(model))(X), net(1)(X))


def test_a_block_that_merges_says_so_and_one_that_shows_the_base_does_not():
    model = inject_all(net())
    randomize_adapters(model)
    other = inject_all(net())
    with merged(model), pytest.raises(LoRAInjectError, match="would count twice"):
        other.load_state_dict(model.state_dict())
    other.load_state_dict(model.state_dict())
    merge(model)
    with disabled(model):
        other.load_state_dict(model.state_dict(), strict=False)
