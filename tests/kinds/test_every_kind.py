"""What every kind of layer promises, kind by kind: one table of layers, one test a promise."""

import copy
import pickle

import pytest
import torch
from every_kind import KINDS, base_output, make
from helpers import changed_parts, randomize_adapters, snapshot

from lora_inject import LoRALayer, inject, reset_lora_parameters, strip

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_step_zero_is_bit_equal(name, dtype):
    layer, call, arguments = make(name, dtype)
    expected = base_output(layer, call)
    inject(layer, **arguments)
    assert torch.equal(call(layer), expected)
    with torch.no_grad():
        assert call(layer).dtype == dtype


@pytest.mark.parametrize("name", KINDS)
def test_training_mode_equals_eval_mode(name):
    layer, call, arguments = make(name, torch.float64)
    expected = base_output(layer, call)
    inject(layer, **arguments)
    randomize_adapters(layer, 0.5)
    trained = call(layer.train())
    assert (trained - expected).abs().max() > 1e-3
    torch.testing.assert_close(call(layer.eval()), trained, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(call(layer.eval()), trained, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_gradcheck(name):
    layer, call, arguments = make(name, torch.float64)
    inject(layer, **arguments)
    randomize_adapters(layer, 0.5)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda *_: call(layer), parameters)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", KINDS)
def test_strip_after_training(name, bias):
    layer, call, arguments = make(name)
    before, expected = snapshot(layer), call(layer)
    inject(layer, bias=bias, **arguments)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        call(layer).pow(2).sum().backward()
        optimizer.step()
    assert not torch.equal(call(layer), expected)
    strip(layer)
    assert changed_parts(before, snapshot(layer)) == []
    assert torch.equal(call(layer), expected)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", KINDS)
def test_copies_compute_the_same_and_can_be_stripped(name, through):
    layer, call, arguments = make(name)
    state = [(key, tensor.clone()) for key, tensor in layer.state_dict().items()]
    inject(layer, **arguments)
    randomize_adapters(layer, 0.5)
    twin = through(layer)
    assert torch.equal(call(twin), call(layer))
    strip(twin)
    assert any(isinstance(m, LoRALayer) for m in layer.modules())
    for (key, tensor), (other, value) in zip(state, twin.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(tensor, value)


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_from_meta_gets_the_eager_values(name, device):
    layer, call, arguments = make(name)
    base = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with torch.device("meta"):
        twin = KINDS[name][0]()
    for each in (layer, twin):
        inject(each, seed=7, **arguments)
    twin.to_empty(device=device)
    twin.load_state_dict(base, strict=False)
    reset_lora_parameters(twin)
    for one, other in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(call(layer), call(twin))
