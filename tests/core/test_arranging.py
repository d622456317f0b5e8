"""Tensors that come, go, move and wait: each stands where the states say, and is made once."""

import pytest
import torch
from helpers import Faults, linears
from torch import nn

from lora_inject import inject, remove, strip, use

pytestmark = pytest.mark.cpu("it is about places, not values")


def test_what_stands_in_for_a_trained_tensor_is_made_once():
    """A graph, a view or an optimizer that holds it goes on holding what the model has."""
    model = linears("a", "b")
    inject(model, "a", r=1, bias="lora_only")
    own = model["a"].bias
    use(model)
    waiting = model["a"].bias
    assert waiting is not own
    inject(model, "b", r=1, adapter="other")
    use(model)
    use(model, "other")
    assert model["a"].bias is waiting
    use(model, "default")
    assert model["a"].bias is own


def test_a_layer_of_many_places_has_one_tensor_in_all_of_them():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].bias = model["c"].bias = model["a"].bias
    inject(model, "a", r=1, bias="all")
    own = model["a"].bias
    own.data.fill_(7)
    for _ in range(2):
        use(model)
        assert model["a"].bias is model["b"].bias is model["c"].bias is not own
        use(model, "default")
        assert model["a"].bias is model["b"].bias is model["c"].bias is own
    assert torch.equal(own, torch.full((2,), 7.0))


def test_what_stands_in_for_a_buffer_is_no_parameter():
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    inject(model, "fc", r=1, train_also="norm")
    own = model["norm"].running_mean
    use(model)
    assert model["norm"].running_mean is not own
    assert type(model["norm"].running_mean) is torch.Tensor
    assert type(model["norm"].weight) is nn.Parameter
    assert not model["norm"].weight.requires_grad


def test_the_base_has_its_own_tensor_again_while_another_owner_goes_on():
    model = linears("a")
    own, value = model["a"].bias, model["a"].bias.detach().clone()
    for name in ("first", "second"):
        inject(model, "a", r=1, bias="lora_only", adapter=name)
        use(model)
    use(model, "second")
    theirs = model["a"].bias
    theirs.data.fill_(7)
    remove(model, "first")
    assert model["a"].bias is theirs
    for _ in range(2):
        use(model)
        assert model["a"].bias is own
        assert torch.equal(own, value)
        use(model, "second")
        assert model["a"].bias is theirs
        assert torch.equal(theirs, torch.full_like(theirs, 7))
    inject(model, "a", r=1, adapter="third")
    use(model, "third")
    assert model["a"].bias is own


def test_where_tensors_move_a_switch_keeps_gradients_and_what_is_not_the_adapters():
    model = linears("a")
    for name in ("first", "second"):
        inject(model, "a", r=1, bias="lora_only", adapter=name)
        use(model)
    use(model, "first")
    layer = model["a"].requires_grad_(True)
    own = {name: p for name, p in layer.named_parameters() if "second" not in name}
    for parameter in own.values():
        parameter.grad = torch.ones_like(parameter)
    use(model, "second")
    assert all(own[name].grad is not None for name in own)
    assert own["weight"].requires_grad
    assert not own["bias"].requires_grad
    assert not [*layer.buffers()]
    use(model, "first")
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == own.keys()
    assert layer.bias is own["bias"]
    use(model, "second", train="second")  # which freezes, and does not only switch
    assert {name for name, p in own.items() if p.grad is not None} == {"weight"}


def test_what_is_in_no_state_dict_waits_in_none():
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    model["norm"].register_buffer("cache", torch.zeros(3), persistent=False)
    inject(model, "fc", r=1, train_also="norm")
    inject(use(model), "fc", r=1, train_also="norm", adapter="other")
    for name in ("default", "other"):
        use(model, name)
        assert any("_cache_kept" in name for name, _ in model.named_buffers())
        assert any("_running_mean_kept" in key for key in model.state_dict())
        assert not any("cache" in key for key in model.state_dict())
    strip(model)
    assert model["norm"]._non_persistent_buffers_set == {"cache"}


def test_what_stands_in_is_as_the_place_is_now_or_as_the_former_value():
    model = nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    model["plain"] = nn.BatchNorm1d(3, track_running_stats=False)
    inject(model, "fc", r=1, bias="all", train_also=["norm", "plain"])
    model.double()
    model["norm"].running_mean = None
    use(model)
    assert model["fc"].bias.dtype == model["norm"].running_var.dtype == torch.float64
    assert torch.equal(model["norm"].running_mean, torch.zeros(3))
    assert model["plain"].running_mean is None


def test_a_list_that_an_lstm_keeps_of_its_weights_follows_what_stands():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "out": nn.Linear(4, 4)})
    lstm = model["lstm"]
    inject(model, "out", r=1, bias="all")
    for names in ((), ("default",), ()):
        use(model, *names)
        kept = zip(lstm._flat_weights, lstm._flat_weights_names, strict=True)
        assert all(tensor is lstm._parameters[name] for tensor, name in kept)


@pytest.mark.parametrize("at", range(0, 14, 2))
def test_buffers_that_no_state_dict_has_stay_so_when_a_change_fails(at):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for name in list(model[1]._buffers):
        model[1].register_buffer(name, model[1]._buffers.pop(name), persistent=False)
    inject(model, "0", r=1, adapter="a", train_also="1")
    inject(model, "0", r=1, adapter="b")
    keys, unsaved = [*model.state_dict()], set(model[1]._non_persistent_buffers_set)
    with Faults(at), pytest.raises(RuntimeError, match="no"):
        use(model, "b")
    assert ([*model.state_dict()], model[1]._non_persistent_buffers_set) == (keys, unsaved)
    use(model, "b")
    assert not any("running" in key for key in model.state_dict())
