"""Each kind of layer: shapes, values and gradients against a float64 reference with W + s B A."""

import pytest
import torch
from families import FAMILIES
from helpers import randomize_adapters, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_inject import (
    Kind,
    LoRAInjectError,
    LoRALayer,
    NoMatchError,
    Spec,
    UnsupportedLayerError,
    inject,
    load,
    plan,
    register_kind,
    save,
    strip,
)
from lora_inject.arithmetic.linear import linear_down, linear_up
from lora_inject.kinds import find_kind

pytestmark = pytest.mark.usefixtures("device")


class Doubled(nn.Linear):
    """A subclass with a forward of its own, which must go on running."""

    def forward(self, input):
        return super().forward(input) * 2


def linear(**options):
    return nn.Linear(5, 3, dtype=torch.float64, **options)


def conv1d():
    return Conv1D(3, 5).double()


def embedding(**options):
    return nn.Embedding(5, 3, dtype=torch.float64, **options)


def reference(layer, x, W, A, B, scaling):
    """What the layer computes with the weight W + s B A in place of W; W is (out, in)."""
    W = W + scaling * B @ A
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, W.T, layer.padding_idx, None, 2.0, layer.scale_grad_by_freq)
    return F.linear(x, W, layer.bias)


CASES = {
    "linear": (linear, lambda: torch.randn(4, 2, 5, dtype=torch.float64)),
    "linear without bias": (lambda: linear(bias=False), lambda: torch.randn(5).double()),
    "Conv1D": (conv1d, lambda: torch.randn(4, 5, dtype=torch.float64)),
    "embedding": (embedding, lambda: torch.tensor([[0, 4, 4], [1, 2, 0]])),
    "embedding with padding": (lambda: embedding(padding_idx=4), lambda: torch.tensor([4, 1, 4])),
    "embedding by frequency": (
        lambda: embedding(scale_grad_by_freq=True),
        lambda: torch.tensor([1, 1, 1, 3]),
    ),
    "one id": (embedding, lambda: torch.tensor(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_those_of_the_merged_weight(case):
    build, make_input = CASES[case]
    layer, x = build(), make_input()
    W = layer.weight.detach().clone()
    W = W if isinstance(layer, nn.Linear) else W.T
    inject(layer, lambda path, module: True, r=2, alpha=5)
    randomize_adapters(layer)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    if x.is_floating_point():
        x.requires_grad_()
    inputs = [x] if x.is_floating_point() else []

    ours = layer(x)
    weights = torch.randn_like(ours)
    expected = reference(layer, x, W, A, B, 2.5)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad((ours * weights).sum(), [layer.lora_A, layer.lora_B, *inputs])
    want = torch.autograd.grad((expected * weights).sum(), [A, B, *inputs])
    if case == "embedding with padding":
        # The reference's B gets a gradient through the padding row of A; a real padding row is 0.
        got, want = got[:1], want[:1]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(
    n_in=st.integers(1, 6),
    n_out=st.integers(1, 6),
    r=st.integers(1, 4),
    leading=st.lists(st.integers(0, 3), max_size=3),
)
def test_linear_down_and_up_for_any_shape(n_in, n_out, r, leading):
    x = torch.randn(*leading, n_in, dtype=torch.float64)
    A, B = torch.randn(r, n_in).double(), torch.randn(n_out, r).double()
    delta = linear_up(linear_down(x, A, 0.0), B)
    assert delta.shape == (*leading, n_out)
    torch.testing.assert_close(delta, x @ (B @ A).T)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    build, make_input = CASES[case]
    layer, x = build(), make_input()
    inject(layer, lambda path, module: True, r=2)
    randomize_adapters(layer)
    parameters = (layer.lora_A, layer.lora_B)
    if case == "embedding by frequency" or layer.__dict__.get("padding_idx") is not None:
        return  # these gradients are not those of the function, by their definition
    assert torch.autograd.gradcheck(lambda *_: layer(x), parameters)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "base", torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding"])
def test_step_zero_is_bit_equal_and_dtypes_are_kept(kind, base, dtype):
    build, make_input = CASES[kind]
    layer, x = build().to(base), make_input()
    x = x.to(base) if x.is_floating_point() else x
    expected = layer(x)
    inject(layer, lambda path, module: True, r=2, dtype=dtype)
    assert torch.equal(layer(x), expected)
    assert layer(x).dtype == base
    wanted = {None: torch.float32, "base": base}.get(dtype, dtype)
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {wanted}
    randomize_adapters(layer)
    layer(x).sum().backward()
    assert layer.lora_A.grad.dtype == wanted
    assert layer.lora_A.grad.any()
    assert layer.lora_B.grad.any()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast(base, device):
    layer, x = nn.Linear(8, 8, dtype=base), torch.randn(4, 8, dtype=base)
    with torch.autocast(device.type, torch.bfloat16):
        expected = layer(x)
    inject(layer, nn.Linear, r=2)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(layer(x), expected)
    randomize_adapters(layer)
    with torch.autocast(
        device.type, torch.bfloat16
    ):  # a new context: autocast keeps casts of weights
        layer(x).float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert layer.lora_A.grad.any()


def test_a_subclass_runs_its_own_forward():
    layer, x = Doubled(4, 4), torch.randn(2, 4)
    expected = layer(x)
    inject(layer, nn.Linear, r=2)
    assert torch.equal(layer(x), expected)
    assert type(layer).__name__ == "LoRADoubled"
    assert isinstance(layer, Doubled)


def test_a_layer_that_returns_no_tensor_says_so():
    class Pair(nn.Linear):
        both = False

        def forward(self, x):
            y = F.linear(x, self.weight, self.bias)
            return (y, None) if self.both else y

    model = nn.ModuleDict({"pair": Pair(4, 4)})
    inject(model, "pair", r=1)
    model["pair"].both = True
    with pytest.raises(LoRAInjectError, match=r"^pair: its forward returned a tuple"):
        model["pair"](torch.randn(2, 4))


def test_conv1d_is_found_by_what_it_is():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return x @ self.weight

    layer = Conv1D()
    inject(layer, lambda path, module: True, r=2)
    assert layer.lora_A.shape == (2, 4)
    assert layer.lora_B.shape == (6, 2)
    assert find_kind(nn.Conv1d(2, 2, 1)).name == "Conv"


def test_dropout_is_on_the_adapter_alone_and_only_in_training():
    layer, x = nn.Linear(64, 4), torch.ones(512, 64)
    inject(layer, nn.Linear, r=2, dropout=0.5)
    base = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), base)  # B is zero, so that dropout cannot show
    with torch.no_grad():
        layer.lora_A.fill_(1 / 64)
        layer.lora_B.fill_(0.5)
    delta = layer(x) - base
    assert delta.std() > 0.01
    assert delta.mean().item() == pytest.approx(1.0, abs=0.02)  # unbiased
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x) - base, torch.ones(512, 4), rtol=1e-5, atol=1e-5)


def test_embedding_dropout_drops_whole_deltas():
    layer, x = nn.Embedding(3, 4), torch.zeros(2000, dtype=torch.long)
    inject(layer, nn.Embedding, r=2, dropout=0.25)
    randomize_adapters(layer)
    delta = layer(x) - layer.weight[0]
    kept = delta.abs().sum(1) > 1e-6
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.04)
    full = layer.eval()(x[:1]) - layer.weight[0]
    torch.testing.assert_close(delta[kept], (full / 0.75).expand(int(kept.sum()), -1))


def test_a_layer_of_a_model_in_eval_mode_is_in_eval_mode():
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    inject(model, nn.Linear, r=2, dropout=0.5)
    randomize_adapters(model)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_padding_rows_get_neither_gradient_nor_delta():
    layer = nn.Embedding(6, 3, padding_idx=2)
    inject(layer, nn.Embedding, r=2)
    x = torch.tensor([2, 1, 2, 5])
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).pow(2).sum().backward()
        assert not layer.lora_A.grad[:, [0, 2, 3, 4]].any()
        assert layer.lora_A.grad[:, [1, 5]].all()
        optimizer.step()
    assert not layer(torch.tensor([2])).any()


def test_a_sparse_embedding_has_a_sparse_gradient_equal_to_the_dense_one():
    x = torch.tensor([[2, 1, 2], [5, 3, 3]])
    gradients = []
    for sparse in (True, False):
        torch.manual_seed(0)
        layer = nn.Embedding(6, 3, padding_idx=3, sparse=sparse)
        inject(layer, nn.Embedding, r=2, seed=0)
        randomize_adapters(layer)
        layer(x).pow(2).sum().backward()
        assert layer.lora_A.grad.is_sparse == sparse
        gradients.append(layer.lora_A.grad.to_dense())
        if sparse:
            torch.optim.SparseAdam([layer.lora_A]).step()
    torch.testing.assert_close(*gradients)
    assert not gradients[0][:, 3].any()


def test_an_embedding_that_sometimes_reads_its_weight():
    class Soft(nn.Embedding):
        def forward(self, x):
            return x @ self.weight if x.is_floating_point() else super().forward(x)

    with pytest.raises(UnsupportedLayerError, match="does not always call"):
        inject(Soft(4, 4), nn.Embedding)
    with pytest.raises(UnsupportedLayerError, match="sparse=True"):
        inject(nn.Embedding(4, 4, sparse=True), nn.Embedding, how="weight")


REFUSED = {
    "max_norm": (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    "own forward": (type("Other", (nn.Embedding,), {"forward": lambda s, x: x})(4, 4), "Other"),
    "lazy": (nn.LazyLinear(4), "forward pass first"),
    "complex": (nn.Linear(4, 4, dtype=torch.complex64), "complex"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_path_and_reason(name):
    layer, reason = REFUSED[name]
    model = nn.Sequential(nn.Linear(4, 4), layer)
    before = [(type(m), dict(vars(m))) for m in model]
    with pytest.raises(UnsupportedLayerError, match=reason) as caught:
        inject(model, "1")
    assert caught.value.path == "1"
    assert str(caught.value).startswith("1: ")
    assert [(type(m), dict(vars(m))) for m in model] == before


def with_a_lazy_layer():
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3), nn.Linear(3, 2))


@pytest.mark.parametrize("runs_first", [False, True])
@pytest.mark.parametrize("targets", [["0", "2"], "all-linear"])
def test_a_lazy_layer_that_is_no_target_is_left_alone(targets, runs_first, tmp_path):
    model = with_a_lazy_layer()
    before = {name: p for name, p in model.named_parameters() if not name.startswith("1")}
    shown = inject(model, targets, r=2)
    assert "2 parameters of lazy layers have no shape yet" in str(shown)
    assert ("Not adapted: 1: it is lazy" in str(shown)) is (targets == "all-linear")
    if runs_first:
        model(torch.ones(2, 4)).sum().backward()
        assert type(model[1]) is nn.Linear
        assert model[1].weight.grad is None
        assert model[0].lora_B.grad.any()
    save(model, tmp_path / "adapter")
    load(with_a_lazy_layer(), tmp_path / "adapter", other_base=True)
    strip(model)
    assert model(torch.ones(2, 4)).shape == (2, 2)
    assert type(model[1]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert all(dict(model.named_parameters())[name] is p for name, p in before.items())


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (with_a_lazy_layer, {"bias": "all"}),
        (with_a_lazy_layer, {"train_also": "1"}),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()), {}),
    ],
    ids=["bias", "train_also", "statistics"],
)
def test_a_lazy_layer_of_which_something_is_to_be_kept_is_refused(model, arguments):
    model = model()
    before = [dict(vars(m)) for m in model]
    with pytest.raises(UnsupportedLayerError, match=r"1: it is lazy .* Run one forward pass first"):
        inject(model, "0", r=2, **arguments)
    assert [dict(vars(m)) for m in model] == before


def test_zero_sized_layers_are_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = nn.Linear(0, 3)
    with pytest.raises(UnsupportedLayerError, match="0 x 3"):
        inject(nn.Sequential(layer), "0")


def test_scripted_modules_are_refused():
    with pytest.warns((DeprecationWarning, FutureWarning), match="jit"):
        scripted = torch.jit.script(nn.Linear(4, 4))
    with pytest.raises(UnsupportedLayerError, match="ScriptModule"):
        inject(scripted, "0")
    model = nn.ModuleDict({"scripted": scripted, "fc": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedLayerError, match=r"scripted\.weight: it is a ScriptModule"):
        inject(model, "scripted.weight")
    with pytest.raises(NoMatchError, match=r"which cannot be adapted\. Names that can be"):
        inject(model, "scripted")  # and not to name what is refused then
    (note,) = inject(model, "all-linear", r=1).notes
    assert "scripted.weight: it is a ScriptModule" in note


def test_a_forward_on_the_instance_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = model[0].forward
    with pytest.raises(UnsupportedLayerError, match="bypass"):
        inject(model, "0")


def test_a_clash_of_names_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].lora_A = nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedLayerError, match="lora_A"):
        inject(model, "0")
    inject(model, "0", adapter="fr")
    assert model[0].lora_A_fr.shape == (8, 4)


def test_attributes_of_the_layer_are_not_hidden():
    class Gated(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.kind, self.adapters, self.settings = "relu", nn.Identity(), 3

        def forward(self, x):
            y = super().forward(x)
            return self.adapters(y).relu() if self.kind == "relu" else y

    model, x = nn.Sequential(Gated()), torch.randn(3, 4)
    expected = model(x)
    inject(model, "0", r=1)
    assert torch.equal(model(x), expected)
    clash = nn.Sequential(nn.Linear(4, 4))
    clash[0].lora_adapters = 3
    with pytest.raises(UnsupportedLayerError, match="lora_adapters"):
        inject(clash, "0")


def test_quantized_subclasses_run_their_own_forward():
    class Packed(nn.Linear):
        """int8 weight as a buffer, one scale, and a forward that unpacks it."""

        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features)
            del self.weight
            self.scale = linear.weight.detach().abs().max() / 127
            self.register_buffer("weight", (linear.weight.detach() / self.scale).round().char())

        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    layer, x = Packed(nn.Linear(6, 4)), torch.randn(3, 6)
    before, expected = snapshot(layer), layer(x)
    inject(layer, nn.Linear, r=2)
    assert torch.equal(layer(x), expected)
    assert layer.lora_A.dtype == torch.float32
    randomize_adapters(layer)
    layer(x).sum().backward()
    assert layer.lora_A.grad.any()
    strip(layer)
    assert snapshot(layer) == before


class ScaleKind(Kind):
    """A kind of the user's: a layer that multiplies by a matrix from the left."""

    name = "Scale"

    def matches(self, module):
        return isinstance(module, LeftMatrix)

    def specs(self, module, settings):
        n_out, n_in = module.weight.shape
        return (Spec("weight", n_in, n_out, (settings.r, n_in), (n_out, settings.r)),)

    def down(self, layer, x, y, A, dropout):
        return A @ x

    def up(self, layer, x, h, B):
        return B @ h


class LeftMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, x):
        return self.weight @ x


def test_users_can_register_a_kind(monkeypatch):
    monkeypatch.setattr("lora_inject.kinds._registry", list(_registry()))
    register_kind(ScaleKind())
    layer, x = LeftMatrix(), torch.randn(4, 2, dtype=torch.float64)
    inject(layer, LeftMatrix, r=2, alpha=6)
    randomize_adapters(layer)
    expected = (layer.weight + 3 * layer.lora_B @ layer.lora_A) @ x
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="kind"):
        register_kind(ScaleKind)


def _registry():
    from lora_inject import kinds

    return kinds._registry


def test_an_adapted_layer_is_what_it_was_and_a_lora_layer():
    layer = nn.Linear(4, 6)
    inject(layer, nn.Linear, r=2, alpha=4, dropout=0.5)
    assert isinstance(layer, LoRALayer)
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "LoRALinear"
    assert repr(layer) == (
        "LoRALinear(in_features=4, out_features=6, bias=True, "
        "lora=default(r=2, alpha=4, dropout=0.5))"
    )
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    assert layer.lora_adapters[0].settings.r == 2


def test_keyword_calls():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    inject(layer, nn.Linear, r=2)
    randomize_adapters(layer)
    assert torch.equal(layer(input=x), layer(x))


def test_the_first_argument_is_found_by_its_name():
    class Scaling(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    layer, x = Scaling(4, 4), torch.randn(2, 4)
    inject(layer, nn.Linear, r=1)
    randomize_adapters(layer)
    assert torch.equal(layer(scale=2.0, x=x), layer(x, scale=2.0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compile_in_one_graph(family):
    build = FAMILIES[family]
    model = build.build().eval()
    inject(model, list(build.targets), r=2)
    randomize_adapters(model)
    inputs = {**build.inputs(), "use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    # The compiler is given the composed way, whose sums are rounded one by one.
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0])


def test_a_large_scaling_does_not_overflow_in_half_precision():
    model, x = nn.Linear(64, 64, dtype=torch.float16), (torch.randn(4, 64) * 3000).half()
    expected = model(x)
    inject(model, nn.Linear, r=8, alpha=512)
    assert torch.equal(model(x), expected)


def test_what_is_adapted_of_a_normed_weight_is_its_size_and_not_that_of_its_norms():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3), dim=2)
    assert [site.base_elements for site in plan(nn.Sequential(layer), "0").sites] == [8 * 8 * 3]
