"""What every variant and start promises on every kind of layer, against the formula in float64."""

import copy
import pickle

import pytest
import torch
from every_kind import KINDS, base_output, make
from helpers import changed_parts, randomize_adapters, snapshot, trainable_names
from torch import nn

from lora_inject import (
    LoRAInjectError,
    inject,
    merge,
    reset_lora_parameters,
    strip,
    unmerge,
    use,
)
from lora_inject.core.state import adapters_of
from lora_inject.starts import STARTS
from lora_inject.variants import VARIANTS, LoKr

METHODS = {
    **{
        f"start {name}": {"init": name}
        for name, start in STARTS.items()
        if name != "default" and not start.needs  # those: tests/starts
    },
    **{f"variant {name}": {"variant": name} for name in VARIANTS if name != "lora"},
    "rslora": {"scaling": "rslora"},
    "dora of pissa": {"variant": "dora", "init": "pissa", "scaling": "rslora"},
    "lokr of two products": {"variant": LoKr(both=True, factor=4), "r": 1},
    "dora of mica": {"variant": "dora", "init": "mica"},
}
pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted"),
]
KERNELS = ("Conv2d", "ConvTranspose2d")
IN_THE_WEIGHT = [name for name, variant in VARIANTS.items() if variant.way == "weight"]
# What a method cannot do with a kind, and the remedy that it names.
REFUSED = {
    **{("variant tucker", kind): "variant='lora'" for kind in KINDS if kind not in KERNELS},
    **{(f"variant {name}", "Linear in parts"): "parts= is for" for name in IN_THE_WEIGHT},
    ("lokr of two products", "Linear in parts"): "parts= is for",
    **{(f"variant {name}", "Conv2d"): "Use 'dora" for name in VARIANTS if "columns" in name},
    **{(f"{name}dora{start}", "grouped Linear"): "use how='weight'"
       for name, start in (("variant ", ""), ("", " of pissa"), ("", " of mica"))},
}  # fmt: skip
every_method_and_kind = pytest.mark.parametrize(
    ("method", "kind"), [(m, k) for m in METHODS for k in KINDS if (m, k) not in REFUSED]
)


def adapted(kind, method, dtype=torch.float32, **more):
    torch.manual_seed(0)
    layer, call, arguments = make(kind, dtype)
    base = copy.deepcopy(layer)
    inject(layer, **{**arguments, **METHODS[method]}, **more)
    return layer, base, call


def moved(layer, scale=0.3):
    """Values that are not those of the start; magnitudes stay near the lengths they are."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.mul_(1 + scale * noise).add_(scale * noise * ("magnitude" not in name))


def low_rank(kind, module, W, spec, own, settings):
    delta = kind.update(module, W, spec, own["A"], own["B"])
    if "A0" in own:
        delta = delta - kind.update(module, W, spec, own["A0"], own["B0"])
    return settings.scaling * delta


def kronecker(own, experts):
    first = own["B"] @ own["B2"] if "B2" in own else own["B"]
    second = own["A2"] @ own["A"] if "A2" in own else own["A"].flatten(1 + experts)
    if experts:
        return torch.stack([torch.kron(*each) for each in zip(first, second, strict=True)])
    return torch.kron(first, second)


# The change before scaling as (out, in * kernel), of experts (E, out, in).
FORMULAS = {
    "loha": lambda own, experts: (own["B"] @ own["A"]) * (own["B2"] @ own["A2"]),
    "lokr": kronecker,
    "tucker": lambda own, experts: torch.einsum(
        "or,rskl,si->oikl", own["B"][..., 0, 0], own["mid"], own["A"][..., 0, 0]
    ),
}


def in_shape_of(kind, module, W, matrix):
    return kind.from_matrix(module, matrix.reshape(kind.to_matrix(module, W).shape), W.shape)


def column_ratio(kind, module, V, magnitude):
    """What the columns of a weight are multiplied by, in its own shape."""
    if isinstance(module, nn.ConvTranspose2d):
        return (magnitude / V.detach().flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
    rows = kind.to_matrix(module, V.detach())
    ratio = (magnitude / rows.norm(dim=-2)).unsqueeze(-2).expand(rows.shape)
    return kind.from_matrix(module, ratio, V.shape)


def changed_weight(module, adapter, spec, names):
    """The change of a weight, written out: what the papers say, every matrix made."""
    kind, settings, W = adapter.kind, adapter.settings, module._parameters[spec.weight]
    own = {role: module.get_parameter(name) for role, name in names.items()}
    name = settings.variant.name.rpartition("_")[2]  # "lokr" of "dora_lokr"
    if name in FORMULAS:
        matrix = settings.scaling * FORMULAS[name](own, 1 if spec.experts else 0)
        V = W + in_shape_of(kind, module, W, matrix)
    else:
        V = W + low_rank(kind, module, W, spec, own, settings)
    if "dora" not in settings.variant.name:
        return V - W
    if "columns" in settings.variant.name:
        return V * column_ratio(kind, module, V, own["magnitude"]) - W
    rows = kind.to_matrix(module, V)
    length = rows.detach().norm(dim=-1)
    ratio = torch.ones_like(length)
    at = slice(spec.start, spec.start + spec.n_out) if spec.part else slice(None)
    ratio[..., at] = (own["magnitude"].reshape(ratio[..., at].shape)) / length[..., at]
    return kind.from_matrix(module, rows * ratio.unsqueeze(-1), W.shape) - W


def written_out(layer, base, call, weights=None):
    """What the base computes with the weights that the adapters make."""
    values = {}
    for path, module in layer.named_modules():
        for adapter in adapters_of(module):
            weight = 1.0 if weights is None else weights.get(adapter.name, 0.0)
            for spec, names in adapter.pairs:
                name = f"{path}.{spec.weight}".lstrip(".")
                total = values.get(name, module._parameters[spec.weight])
                values[name] = total + weight * changed_weight(module, adapter, spec, names)
    return call(lambda *x: torch.func.functional_call(base, values, x))


def call_of(call, base):
    """``call`` for a function in place of a module."""
    many = isinstance(base, nn.MultiheadAttention)

    class Shown(nn.MultiheadAttention if many else nn.Module):
        def __init__(self, function):
            nn.Module.__init__(self)
            self.function = function

        def forward(self, *x):
            return self.function(*x)

    return lambda function: call(Shown(function))


@pytest.mark.parametrize(("method", "kind"), REFUSED)
def test_what_a_method_cannot_do_with_a_kind_is_refused_with_the_remedy(method, kind):
    layer, _, arguments = make(kind)
    before = snapshot(layer)
    with pytest.raises(LoRAInjectError, match=REFUSED[method, kind]):
        inject(layer, **{**arguments, **METHODS[method]})
    assert changed_parts(before, snapshot(layer)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_method_and_kind
def test_step_zero_is_bit_equal(method, kind, dtype):
    torch.manual_seed(0)
    layer, call, arguments = make(kind, dtype)
    expected = base_output(layer, call)
    inject(layer, **{**arguments, **METHODS[method]})
    assert torch.equal(call(layer), expected)
    with torch.no_grad():
        assert torch.equal(call(layer), call(strip(copy.deepcopy(layer))))


@every_method_and_kind
def test_values_and_gradients_are_those_of_the_formula(method, kind):
    layer, base, call = adapted(kind, method, torch.float64)
    moved(layer)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    output = call(layer)
    expected = written_out(layer, base, call_of(call, base))
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    ours = torch.autograd.grad((output * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(call(layer), output, rtol=1e-9, atol=1e-10)


@every_method_and_kind
def test_trained_merged_unmerged_and_stripped(method, kind):
    torch.manual_seed(0)
    layer, call, arguments = make(kind)
    before, expected = snapshot(layer), call(layer)
    model = nn.ModuleDict({"layer": layer})
    inject(model, **{**arguments, **METHODS[method]})
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        call(layer).pow(2).sum().backward()
        optimizer.step()
    trained = call(layer)
    assert not torch.equal(trained, expected)
    merge(model)
    torch.testing.assert_close(call(layer), trained, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(call(layer), trained)
    twin = strip(pickle.loads(pickle.dumps(model)))
    assert torch.equal(call(twin["layer"]), expected)
    strip(model)
    assert changed_parts(before, snapshot(layer)) == []
    assert torch.equal(call(layer), expected)


@every_method_and_kind
def test_two_in_use_with_weights_add_up_in_any_order(method, kind):
    layer, base, call = adapted(kind, method, torch.float64, adapter="one", seed=1)
    _, _, arguments = make(kind, torch.float64)
    inject(layer, **{**arguments, **METHODS[method]}, adapter="two", seed=2)
    use(layer, "one", "two", train=("one", "two"))
    moved(layer)
    outputs = []
    for weights in ({"one": 0.7, "two": -0.4}, {"two": -0.4, "one": 0.7}):
        use(layer, weights)
        outputs.append(call(layer))
    expected = written_out(layer, base, call_of(call, base), weights)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-10)
    use(layer, {"one": 0.0})
    torch.testing.assert_close(call(layer), call(base), rtol=1e-9, atol=1e-10)


@every_method_and_kind
def test_a_layer_from_meta_gets_the_eager_values(method, kind, device):
    torch.manual_seed(0)
    layer, call, arguments = make(kind)
    base = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with torch.device("meta"):
        twin = KINDS[kind][0]()
    for each in (layer, twin):
        inject(each, seed=7, **{**arguments, **METHODS[method]})
    assert trainable_names(layer) == trainable_names(twin)
    twin.to_empty(device=device)
    twin.load_state_dict(base, strict=False)
    reset_lora_parameters(twin)
    for one, other in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    randomize_adapters(layer)
    reset_lora_parameters(layer)
    assert torch.equal(call(layer), call(twin))
