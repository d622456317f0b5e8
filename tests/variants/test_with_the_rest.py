"""What the rest of the library promises, kept by every method: not only by plain LoRA."""

import copy
import io

import pytest
import torch
from every_kind import KINDS, make
from helpers import Net, changed_parts, ids, snapshot, train_steps, trainable_names
from products import held
from stored_models import peft_loads
from test_every_method import METHODS, REFUSED, adapted, changed_weight, moved
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_inject import (
    FormatError,
    UnsupportedLayerError,
    capacity,
    disabled,
    inject,
    load,
    merge,
    merged,
    plan,
    report,
    save,
    strip,
    use,
)
from lora_inject.core.state import adapters_of
from lora_inject.starts import PiSSA

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted"),
]
ON_LINEAR = [name for name in METHODS if (name, "Linear") not in REFUSED]
every_method = pytest.mark.parametrize("method", ON_LINEAR)
STARTS_OF_WEIGHTS = ["pissa", "milora", "olora", "mica"]


def net(method, dtype=torch.float64, **more):
    torch.manual_seed(0)
    model = Net().to(dtype)
    inject(model, ["q_proj", "v_proj"], **{"r": 2, "alpha": 3, **METHODS[method]}, **more)
    moved(model)
    return model


def gradients(model, output):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(output.square().sum(), parameters)


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_those_without(method, reentrant):
    model, tokens = net(method, dropout=0.5 if METHODS[method].get("init") == "pissa" else 0), ids()
    x = model.embed(tokens).detach().requires_grad_()

    def run(recomputed):
        torch.manual_seed(1)
        y = x
        for block in model.layers:
            y = checkpoint(block, y, use_reentrant=reentrant) if recomputed else block(y)
        model.head(y).square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        return found

    expected, got = run(False), run(True)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["start pissa", "dora of pissa", "variant lokr"])
def test_compiled_in_one_graph_and_exported(method):
    model, tokens = net(method), ids()
    expected = model(tokens)
    wanted = gradients(model, expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(model, compiled(tokens)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    model.eval()
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "kind"),
    [(m, k) for m in METHODS for k in ("Linear", "Conv2d", "Embedding") if (m, k) not in REFUSED],
)
def test_gradcheck(method, kind):
    layer, _, call = adapted(kind, method, torch.float64)
    moved(layer)
    own = [(name, p) for name, p in layer.named_parameters() if p.requires_grad]
    if any("magnitude" in name for name, _ in own):  # through lengths no gradient is to flow
        own = [(name, p) for name, p in own if "magnitude" in name]
    assert torch.autograd.gradcheck(lambda *_: call(layer), [p for _, p in own])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("method", "kind"), [(m, k) for m in METHODS for k in KINDS if (m, k) not in REFUSED]
)
def test_merging_rounds_once(method, kind, dtype):
    torch.manual_seed(0)
    layer, _, arguments = make(kind, dtype)
    model = nn.ModuleDict({"layer": layer})
    inject(model, **{**arguments, **METHODS[method]})
    moved(layer)
    wide, found = copy.deepcopy(model).double(), {}
    for path, module in wide.named_modules():
        for adapter in adapters_of(module):
            for spec, names in adapter.pairs:
                key = f"{path}.{spec.weight}"
                total = found.get(key, module._parameters[spec.weight])
                found[key] = total + changed_weight(module, adapter, spec, names)
    merge(model)
    for key, exact in found.items():
        weight, wanted = model.get_parameter(key), exact.detach().to(dtype)
        # What float32 makes of a value between two may round to the other one.
        away = (weight.double() - exact).abs() / exact.abs().clamp_min(1e-3)
        assert float((weight == wanted).double().mean()) > 0.97
        assert away.max() <= torch.finfo(dtype).eps


@every_method
def test_disabled_merged_and_without_weight_it_is_the_base(method):
    model, tokens = net(method, torch.float32), ids()
    base = strip(copy.deepcopy(model))(tokens)
    trained = model(tokens)
    with disabled(model):
        assert torch.equal(model(tokens), base)
    with merged(model):
        torch.testing.assert_close(model(tokens), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(tokens), trained)
    use(model)
    assert torch.equal(model(tokens), base)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_second_adapter_starts_from_the_same_base(start):
    model, tokens = Net(), ids()
    base = model(tokens)
    for name in ("one", "two"):
        inject(model, "q_proj", r=2, init=start, adapter=name)
        assert torch.equal(model(tokens), base)
    use(model, "one", "two")
    assert torch.equal(model(tokens), base)
    layer = model.layers[0].q_proj
    assert torch.equal(layer.lora_A0_one, layer.lora_A0_two)


@every_method
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_bias_modes_and_a_head_train_beside_it_and_come_back(method, bias, tmp_path):
    torch.manual_seed(0)
    model, tokens = Net(), ids()
    before, base = snapshot(model), copy.deepcopy(model)
    inject(model, ["q_proj", "v_proj"], bias=bias, train_also="head",
           **{"r": 2, "alpha": 3, **METHODS[method]})  # fmt: skip
    train_steps(model, tokens)
    trained, weights = model(tokens), trainable_names(model)
    assert ("layers.0.q_proj.bias" in weights) is (bias != "none")
    assert "head.weight" in weights
    torch.save(model.state_dict(), file := io.BytesIO())
    again = copy.deepcopy(base)
    inject(again, ["q_proj", "v_proj"], bias=bias, train_also="head", seed=9,
           **{"r": 2, "alpha": 3, **METHODS[method]})  # fmt: skip
    file.seek(0)
    again.load_state_dict(torch.load(file))
    assert torch.equal(again(tokens), trained)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_the_bias_that_a_dora_leaves_alone_is_the_trained_one():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    inject(model, "0", r=2, variant="dora", bias="lora_only")
    x, layer = torch.randn(3, 6).double(), model[0]
    with torch.no_grad():
        layer.bias.add_(2)
        layer.lora_magnitude.mul_(3)
    torch.testing.assert_close(model(x), 3 * F.linear(x, layer.weight) + layer.bias)


@pytest.mark.cpu("files")
@pytest.mark.parametrize("method", ["start pissa", "start olora", "dora of pissa"])
@pytest.mark.parametrize("rest", [{"train_also": "head"}, {"bias": "lora_only"}])
def test_peft_computes_a_converted_start_with_all_that_trains_beside(method, rest, tmp_path):
    torch.manual_seed(0)
    base, tokens = Net().eval(), ids()
    model = copy.deepcopy(base)
    inject(model, ["q_proj", "embed"], **rest, **{"r": 2, "alpha": 3, **METHODS[method]})
    train_steps(model, tokens)
    model.eval()
    save(model, tmp_path / "a")
    output = model(tokens)
    theirs = peft_loads(base, tmp_path / "a")
    torch.testing.assert_close(theirs(tokens), output, rtol=1e-4, atol=1e-5)
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "a")(tokens), output)


@pytest.mark.cpu("files")
def test_a_randomized_start_comes_back_from_its_file_to_the_last_bit(tmp_path):
    model = nn.ModuleDict({"proj": nn.Linear(12, 10)})
    base, x = copy.deepcopy(model), torch.randn(3, 12)
    inject(model, "proj", r=2, init=PiSSA(exact=False))
    with torch.no_grad():
        model["proj"].lora_B.mul_(1.5)
    save(model, tmp_path / "a")
    load(base, tmp_path / "a")
    assert torch.equal(base["proj"](x), model["proj"](x))


@pytest.mark.parametrize("start", STARTS_OF_WEIGHTS)
def test_more_rank_than_a_matrix_has_directions_is_refused(start):
    model = nn.Sequential(nn.Linear(16, 20))
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* 16 directions here, fewer than r=20"):
        inject(model, "0", r=20, init=start)
    assert changed_parts(before, snapshot(model)) == []


OTHERS = [
    ({"variant": "dora"}, "dora"), ({"init": "pissa"}, "start subtracted"),
    ({"variant": "loha"}, "loha"),
]  # fmt: skip


@pytest.mark.parametrize(("other", "named"), OTHERS)
@pytest.mark.parametrize("strict", [True, False])
def test_the_method_travels_with_a_state_dict_and_is_compared(other, named, strict):
    plain, model = Net(), Net()
    inject(plain, "q_proj", r=2)
    inject(model, "q_proj", r=2, **other)
    for state, target in ((plain, model), (model, plain)):
        before = snapshot(target)
        with pytest.raises(FormatError, match=named):
            target.load_state_dict(state.state_dict(), strict=strict)
        assert changed_parts(before, snapshot(target)) == []


@pytest.mark.parametrize("method", ["variant dora", "dora of pissa", "variant loha"])
def test_every_tensor_has_a_row_of_the_report_and_the_plan_names_the_method(method):
    planned = plan(Net(), ["q_proj", "v_proj"], **{"r": 2, "alpha": 3, **METHODS[method]})
    model = net(method)
    rows = report(model).split
    for role in adapters_of(model.layers[0].q_proj)[0].pairs[0].names:
        own = [p for n, p in model.named_parameters() if n.endswith(f"lora_{role}")]
        trained = sum(p.numel() for p in own if p.requires_grad)
        assert rows.get(f"lora_{role}", 0) == trained > 0 or role in ("A0", "B0")
    assert planned.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert METHODS[method]["variant"] in str(planned)


@pytest.mark.cpu("the allocator of the CPU tells")
@pytest.mark.parametrize("method", ["variant dora", "start pissa", "dora of pissa"])
def test_capacity_counts_what_it_keeps(method):
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    inject(model, nn.Linear, **{"r": 4, "alpha": 6, **METHODS[method]})
    x = torch.randn(256, 64)
    kept = held(lambda: model(x.clone()).grad_fn)  # and nothing of the output itself
    assert capacity(model, x).activations == pytest.approx(kept, rel=0.1)


def test_merged_with_the_layers_own_geometry():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2, padding_mode="circular").double()
    model, x = nn.ModuleDict({"conv": layer}), torch.randn(2, 4, 7, 7).double()
    inject(model, "conv", r=2, variant="dora")
    moved(layer)
    expected = layer(x)
    merge(model)
    torch.testing.assert_close(layer(x), expected)
