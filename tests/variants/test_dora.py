"""DoRA: lengths without matrices, what is kept, and what it cannot do."""

import copy

import pytest
import torch
from helpers import Net, changed_parts, quantize, snapshot, train_steps
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lora_inject import (
    UnsupportedLayerError,
    combine,
    inject,
    load,
    load_lora_state_dict,
    lora_state_dict,
    merge,
    param_groups,
    per_row,
    plan,
    report,
    save,
    strip,
    use,
)


def adapted(n_in=96, n_out=160, **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_out))
    base = copy.deepcopy(model)
    inject(model, "0", r=4, alpha=6, variant="dora", **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (model[0].lora_A, model[0].lora_B, model[0].lora_magnitude):
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter))
    return model, base


def formula(base, layer, x, dropped=None):
    """The paper's, with every matrix made, in float64; dropout on the input of A alone."""
    W, b = base.weight.double(), base.bias.double()
    own = {n: getattr(layer, f"lora_{n}").detach().double().requires_grad_() for n in "AB"}
    m = layer.lora_magnitude.detach().double().requires_grad_()
    V = W + 1.5 * own["B"] @ own["A"]
    f = m / V.detach().norm(dim=1)
    x = x.detach().double().requires_grad_()
    x_d = x if dropped is None else x * dropped
    y = b + f * (x @ W.T + 1.5 * (x_d @ own["A"].T) @ own["B"].T)
    return y, (x, own["A"], own["B"], m)


@pytest.mark.parametrize("rows", [3, 400])  # a small input goes another way than a large one
def test_values_and_gradients_of_small_and_large_inputs(rows):
    model, base = adapted()
    x = torch.randn(rows, 96, requires_grad=True)
    layer = model[0]
    y = model(x)
    expected, leaves = formula(base[0], layer, x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    g = torch.randn(y.shape)
    ours = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B, layer.lora_magnitude), g)
    theirs = torch.autograd.grad(expected, leaves, g.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


def test_dropout_leaves_what_the_base_computes():
    model, base = adapted(dropout=0.5)
    with torch.no_grad():
        model[0].lora_B.zero_()
        model[0].lora_magnitude.copy_(base[0].weight.norm(dim=1))
    x = torch.randn(300, 96)
    torch.testing.assert_close(model.train()(x), base(x), rtol=1e-5, atol=1e-5)


class Shapes(TorchDispatchMode):
    """The shapes of all that is made."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "view" not in str(func) and not func.is_view:
            self.made.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_weight_is_made(dtype):
    model, _ = adapted()
    model[0].to(dtype)
    x = torch.randn(400, 96, dtype=dtype, requires_grad=True)
    with Shapes() as shapes:
        model(x).sum().backward()
    assert not {(160, 96), (96, 160)} & shapes.made


def test_one_output_more_than_lora_is_kept():
    kept = {}
    for variant in ("lora", "dora"):
        model = nn.Sequential(nn.Linear(96, 160))
        inject(model, "0", r=4, variant=variant)
        found = {}

        def pack(tensor, found=found):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(400, 96))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept[variant] = sum(size for at, size in found.items() if at not in own)
        assert output.requires_grad
    assert kept["dora"] - kept["lora"] <= 4 * (400 * 160 + 4 * 160)


def test_a_compiler_makes_one_graph_of_it_and_weights_need_no_other():
    model, _ = adapted()
    x = torch.randn(40, 96)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    model, base = adapted()
    compiled, outputs = torch.compile(model, fullgraph=True, backend="aot_eager"), {}
    for weight in (0.5, 0.25, 0.75):
        use(model, {"default": weight})
        outputs[weight] = compiled(x)
        torch.testing.assert_close(outputs[weight], model(x), rtol=1e-5, atol=1e-5)
    middle = base(x) + 0.5 * (expected - base(x))
    torch.testing.assert_close(outputs[0.5], middle, rtol=1e-4, atol=1e-5)


def test_under_autocast_lengths_are_those_of_float32():
    model, base = adapted()
    x = torch.randn(40, 96)
    with torch.no_grad():
        model[0].lora_B.zero_()
        model[0].lora_magnitude.copy_(base[0].weight.norm(dim=1))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), base(x))


def test_another_base_is_another_length():
    model, base = adapted()
    with torch.no_grad():
        model[0].lora_B.zero_()
    strip_me = model.state_dict()
    strip_me["0.weight"] = 2 * strip_me["0.weight"]
    model.load_state_dict(strip_me)
    x = torch.randn(7, 96)
    ratio = model[0].lora_magnitude / (2 * base[0].weight).norm(dim=1)
    expected = F.linear(x, 2 * base[0].weight) * ratio + base[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_the_magnitude_has_a_row_of_its_own_and_never_decays():
    model, _ = adapted()
    assert report(model).split["lora_magnitude"] == 160
    assert plan(nn.Sequential(nn.Linear(96, 160)), "0", r=4, variant="dora").parameters == (
        4 * (96 + 160) + 160
    )
    groups = {g["name"]: g for g in param_groups(model, lr=1e-3, weight_decay=0.1, lr_ratio=16)}
    assert (groups["lora_magnitude"]["lr"], groups["lora_magnitude"]["weight_decay"]) == (1e-3, 0)
    assert groups["lora_B"]["lr"] == 16e-3


def test_a_dead_row_stays_the_base():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
    x = torch.randn(5, 4)
    expected = copy.deepcopy(model)(x)
    inject(model, "0", r=2, variant="dora")
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("how", ["auto", "weight"])
@pytest.mark.parametrize("variant", ["dora", "dora_columns", "dora_lokr"])
def test_a_narrower_magnitude_starts_at_the_lengths_of_a_wider_base(variant, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Conv1d(5, 6, 1)).double()
    x = torch.randn(5, 7, dtype=torch.float64)
    expected = model(x)
    inject(model, ["0", "1"], r=2, variant=variant, how=how, dtype=torch.float32)
    assert torch.equal(model(x), expected)


class Own(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_it_cannot_do_is_refused_by_path():
    model = nn.Sequential(Own(4, 4))
    before = snapshot(model)
    with pytest.raises(UnsupportedLayerError, match=r"0: Own has a forward.*how='weight'"):
        inject(model, "0", variant="dora")
    assert changed_parts(before, snapshot(model)) == []
    inject(model, "0", r=2, variant="dora", how="weight")
    x = torch.randn(3, 4)
    assert torch.equal(model(x), strip(copy.deepcopy(model))(x))

    twice = nn.Sequential(Twice(4, 5))
    inject(twice, "0", r=2, variant="dora")  # below the forward that doubles it
    with torch.no_grad():
        twice[0].lora_magnitude.mul_(3)
        expected = 2 * (3 * F.linear(x, twice[0].weight) + twice[0].bias)
        torch.testing.assert_close(twice(x), expected)

    model = Net()
    inject(model, "q_proj", r=2, variant="dora", adapter="fr")
    inject(model, "q_proj", r=2, adapter="de")
    with pytest.raises(UnsupportedLayerError, match=r"q_proj: 'fr' is a dora.*combine|use"):
        combine(model, {"fr": 1.0, "de": 1.0}, "both", how="cat")


METHODS = [{"variant": "dora"}, {"init": "pissa"}, {"variant": "dora", "init": "olora"}]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("config", ["int8", "int4"])
def test_over_a_quantized_base(config, method, tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8, bias=False))
        quantize(model, config)
        return model

    model, x = build(), torch.randn(5, 32)
    expected = model(x)
    dense = [model[i].weight.dequantize() for i in (0, 2)]
    inject(model, nn.Linear, r=4, alpha=8, seed=1, **method)
    assert torch.equal(model(x), expected)
    first = train_steps(model, x, steps=1)
    assert train_steps(model, x, steps=10) < first
    bias = model[0].bias

    plain = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8, bias=False))
    with torch.no_grad():
        plain[0].weight.copy_(dense[0])
        plain[2].weight.copy_(dense[1])
        plain[0].bias.copy_(bias)
    inject(plain, nn.Linear, r=4, alpha=8, **method)
    values = {k: v for k, v in lora_state_dict(model).items() if "lengths" not in k}
    load_lora_state_dict(plain, values)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)

    save(model, tmp_path / "a")
    output = model(x)
    load(model, tmp_path / "a")
    assert torch.equal(model(x), output)
    again = build()
    load(again, tmp_path / "a")
    assert torch.equal(again(x), output)
    strip(model)
    assert torch.equal(model(x), expected)


def test_a_weight_that_is_computed_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedLayerError, match=r"0: variant='dora'.*computed"):
        inject(model, "0", variant="dora")


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Embedding])
def test_rows_have_a_dora_each(kind):
    torch.manual_seed(0)
    layer = {nn.Linear: lambda: nn.Linear(4, 6), nn.Conv1d: lambda: nn.Conv1d(4, 6, 3),
             nn.Embedding: lambda: nn.Embedding(9, 6)}[kind]()  # fmt: skip
    x = torch.randint(0, 9, (4, 5)) if kind is nn.Embedding else torch.randn(4, 4, 4)
    model = nn.Sequential(layer)
    base = model(x)
    for name, method in {"fr": {"variant": "dora"}, "de": {}, "it": {"init": "pissa"}}.items():
        inject(model, "0", r=2, adapter=name, **method)
        use(model, name)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.2).add_(0.1)
    rows = ["fr", None, "it", "de"]
    expected = []
    for i, name in enumerate(rows):
        use(model, *([name] if name else []))
        expected.append(model(x)[i])
    use(model, "fr", "de", "it")
    with per_row(model, rows):
        output = model(x)
        output.sum().backward()
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(output[1], base[1])
    assert layer.lora_magnitude_fr.grad.any()


def test_others_are_not_merged_into_the_weight_that_it_is_a_change_of():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
    inject(model, "layer", r=2, adapter="plain")
    inject(model, "layer", r=2, adapter="dora", variant="dora")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2).add_(0.1)
    x = torch.randn(3, 4)
    expected = model["layer"](x)
    with pytest.raises(UnsupportedLayerError, match=r"layer: 'dora' is a dora.*Merge 'dora' too"):
        merge(model, "plain")
    assert torch.equal(model["layer"](x), expected)
    merge(model, "dora")
    merge(model, "plain")
    torch.testing.assert_close(model["layer"](x), expected)
