"""What a module multiplies by its weights, attention above all, is multiplied by A and B too."""

import pytest
import torch
from helpers import randomize_adapters
from products import Made
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_inject import inject, plan
from lora_inject.kinds import projections
from lora_inject.kinds.experts import LazyWeight

pytestmark = pytest.mark.usefixtures("device")

E = 64


def self_attention(layer, x):
    return layer(x, x, x)[0]


def encoder_decoder(layer, x):
    y = x.flip(0)
    return layer(x, y, y)[0]


def three_inputs(layer, x):
    return layer(x, x.flip(0), x.flip(1))[0]


def unbatched(layer, x):
    return layer(x[0], x[0], x[0])[0]


CALLS = [self_attention, encoder_decoder, three_inputs, unbatched]


def attention(**options):
    return nn.MultiheadAttention(E, 4, **options)


def gradients(module, call, x):
    module.zero_grad()
    y = call(module, x)
    y.square().sum().backward()
    return [y, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_attention_makes_no_weight_and_computes_what_it_would_with_one(
    call, batch_first, bias, monkeypatch
):
    layer, x = attention(batch_first=batch_first, bias=bias), torch.randn(3, 3, E)
    before = call(layer, x)
    inject(layer, nn.MultiheadAttention, r=3, alpha=5)
    assert torch.equal(call(layer, x), before)
    randomize_adapters(layer, 0.1)
    with Made(layer, E * E) as watched:
        found = gradients(layer, call, x)
    assert not watched.shapes
    monkeypatch.setattr(projections, "packed_projections", None)  # as where torch has it no more
    with Made(layer, E * E) as watched:
        expected = gradients(layer, call, x)
    assert watched.shapes
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_separate_projections_make_no_weight():
    layer, x = attention(kdim=32, vdim=48), torch.randn(3, 2, E)
    inject(layer, nn.MultiheadAttention, r=2)
    randomize_adapters(layer)
    with Made(layer, 32 * E) as watched:
        layer(x, torch.randn(3, 2, 32), torch.randn(3, 2, 48))[0].sum().backward()
    assert not watched.shapes


def test_in_eval_mode_without_gradients_the_fast_path_of_attention_is_kept(monkeypatch):
    calls, fast = [], torch._native_multi_head_attention
    monkeypatch.setattr(
        torch, "_native_multi_head_attention", lambda *args: calls.append(args) or fast(*args)
    )
    layer, x = attention(batch_first=True).eval(), torch.randn(2, 3, E)
    inject(layer, nn.MultiheadAttention, r=2)
    randomize_adapters(layer)
    with torch.no_grad():
        found = self_attention(layer, x)
    assert len(calls) == 1
    torch.testing.assert_close(self_attention(layer, x), found, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1  # where gradients are recorded, torch has none


@pytest.mark.parametrize("reentrant", [True, False])
def test_attention_under_checkpointing(reentrant):
    layer, x = attention(batch_first=True), torch.randn(2, 3, E, requires_grad=True)
    inject(layer, nn.MultiheadAttention, r=2)
    randomize_adapters(layer)
    expected = gradients(layer, self_attention, x)
    found = gradients(
        layer, lambda m, x: checkpoint(self_attention, m, x, use_reentrant=reentrant), x
    )
    assert all(map(torch.equal, found, expected))


def test_attention_under_autocast_follows_it():
    layer, x = attention(), torch.randn(3, 2, E)
    inject(layer, nn.MultiheadAttention, r=2)
    randomize_adapters(layer)
    expected = self_attention(layer, x)
    with torch.autocast(x.device.type, torch.bfloat16):
        found = self_attention(layer, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_a_linear_layer_that_is_adapted_in_its_weight_makes_none_where_it_is_called(training):
    layer, x = nn.Linear(E, E).train(training), torch.randn(3, E)
    inject(layer, nn.Linear, r=2, how="weight")
    randomize_adapters(layer)
    with Made(layer, E * E) as watched:
        found = layer(x)
        found.sum().backward()
    assert not watched.shapes
    torch.testing.assert_close(found, nn.functional.linear(x, layer.weight, layer.bias))


LATER = [{"init": init} for init in ("default", "olora", "pissa", "gaussian")] + [
    {"variant": variant} for variant in ("dora", "loha", "lokr")
]


@pytest.mark.parametrize("method", LATER, ids=lambda method: str(*method.values()))
def test_an_adapter_that_comes_later_changes_nothing_yet(method):
    """However it starts: what is multiplied in one go stays so, and what it adds is exactly 0."""
    model = nn.Sequential(nn.Linear(40, 70)).double()
    x = torch.randn(3, 50, 40).double()
    inject(model, "0", r=3, how="weight", fixed="A", adapter="a")
    inject(model, "0", r=3, how="weight", adapter="b")
    randomize_adapters(model)
    before = model(x)
    inject(model, "0", r=3, how="weight", adapter="c", **method)
    assert torch.equal(model(x), before)


def test_the_encoder_in_training_makes_one_weight_which_attention_reads_of_another_module():
    layer = nn.TransformerEncoderLayer(E, 4, 2 * E, batch_first=True)
    inject(layer, "all-linear", r=2)
    randomize_adapters(layer)
    with Made(layer, E * E) as watched:
        layer(torch.randn(2, 3, E)).sum().backward()
    assert set(watched.shapes) == {(E, E)}  # that of out_proj, and its gradient


def test_plan_says_where_a_weight_is_multiplied():
    layer = nn.TransformerEncoderLayer(E, 4, 2 * E)
    assert all(site.multiplies for site in plan(layer, "all-linear").sites)
    assert "(in products with its weight)" in str(plan(layer, "self_attn"))
    # As attention never calls out_proj; nor does the encoder call this one on its fast path.
    assert "(in its weight, or products if called)" in str(plan(layer, "linear1"))
    assert not plan(layer, "self_attn", variant="dora").sites[0].multiplies


def test_parts_of_a_weight_are_multiplied_and_its_columns_are_tensors():
    seen = []

    class Looking(nn.MultiheadAttention):
        def forward(self, *args):
            weight = self.in_proj_weight
            seen.extend([*weight.split([E, 2 * E]), *weight.chunk(2, 1), weight[:E], weight[0]])
            return super().forward(*args)

    layer, x = Looking(E, 4), torch.randn(3, 2, E)
    inject(layer, nn.MultiheadAttention, r=2)
    randomize_adapters(layer)
    self_attention(layer, x)
    whole = layer.in_proj_weight
    expected = [*whole.split([E, 2 * E]), *whole.chunk(2, 1), whole[:E], whole[0]]
    assert [isinstance(w, LazyWeight) for w in seen] == [True, True, False, False, False, False]
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one + 0), other + 0)


def test_a_jagged_batch_is_multiplied_as_torch_multiplies_it():
    layer, rows = nn.Linear(E, E), [torch.randn(2, E), torch.randn(3, E)]
    inject(layer, nn.Linear, r=2, how="weight")
    randomize_adapters(layer)
    y = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
    assert y.is_nested
    torch.testing.assert_close(y.values(), layer(torch.cat(rows)))
    y.values().sum().backward()
    assert layer.lora_B.grad.any()
