"""Fused experts multiply by W and by A and B, and nothing of the weight's size is made for it."""

import copy

import pytest
import torch
from helpers import randomize_adapters
from products import Made
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.memory import bytes_kept
from lora_inject import LoRAInjectError, inject, load, plan, save, strip, use
from lora_inject.errors import UnsupportedLayerError
from lora_inject.kinds.experts import ExpertWeights
from lora_inject.kinds.multiplied import MultipliedWeight

pytestmark = pytest.mark.usefixtures("device")

E, H, M, TOP = 4, 128, 128, 2
NAMES = ["gate_up_proj", "down_proj"]
WAYS = ["eager", "batched_mm", "grouped_mm", "fallback"]
FAMILIES = {
    "out_in": lambda way: Qwen3MoeExperts(
        Qwen3MoeConfig(
            num_experts=E, hidden_size=H, moe_intermediate_size=M, experts_implementation=way
        )
    ),
    "in_out": lambda way: GptOssExperts(
        GptOssConfig(
            num_local_experts=E, hidden_size=H, intermediate_size=M, experts_implementation=way
        )
    ),
}
# Of what is computed, relative to the norm of what float64 gives.
CLOSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture
def build(monkeypatch):
    def built(family, way, dtype=torch.float32):
        if way == "fallback":
            monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
        model = FAMILIES[family]("grouped_mm" if way == "fallback" else way)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        return model.to(dtype).requires_grad_(False)

    return built


def inputs(dtype=torch.float32, tokens=3):
    """Tokens, the experts of each, and their weights; one expert has no token."""
    index = torch.stack([torch.randperm(E - 1)[:TOP] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP).softmax(-1).to(dtype)
    return torch.randn(tokens, H).to(dtype).requires_grad_(), index, weights


def trained(model):
    named = ((n.removeprefix("_orig_mod."), p) for n, p in model.named_parameters())
    return {name: p for name, p in named if "lora_" in name}


def in_float64(model, x, index, weights, used=None):
    """The output, and the gradients of x and of A and B, with W + s B A in float64."""
    used = used or {"default": 1.0}
    plain = strip(copy.deepcopy(model))
    plain.config._experts_implementation = "eager"
    values = {n: p.detach().double() for n, p in model.named_parameters()}
    leaves = {n: values[n].requires_grad_() for n in trained(model)}
    whole = {n: v for n, v in values.items() if n not in leaves}
    for adapter in model.lora_adapters:
        for spec, names in adapter.pairs:
            BA = leaves[names["B"]] @ leaves[names["A"]]
            BA = BA.mT if model.is_transposed else BA
            whole[spec.weight] = (
                whole[spec.weight] + adapter.settings.scaling * used[adapter.name] * BA
            )
    x = x.detach().double().requires_grad_()
    y = functional_call(plain, whole, (x, index, weights.double()))
    y.pow(2).sum().backward()
    return y, {"x": x.grad, **{n: v.grad for n, v in leaves.items()}}


def require_close(found, expected, tolerance):
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error < tolerance, error


def step(model, x, index, weights):
    y = model(x, index, weights)
    y.float().pow(2).sum().backward()
    return y, {"x": x.grad, **{n: p.grad for n, p in trained(model).items()}}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_float64(family, way, dtype, build):
    model = build(family, way, dtype)
    inject(model, NAMES, r=3, alpha=5)
    inject(model, NAMES, r=8, adapter="fr")
    used = {"default": 1.0, "fr": 0.5}
    use(model, used)
    assert model.down_proj_lora_A.shape[1] == 3  # no rank is padded but inside of a product
    randomize_adapters(model, 0.1)
    args = inputs(dtype)
    expected, gradients = in_float64(model, *args, used)
    y, found = step(model, *args)
    assert y.dtype == dtype
    require_close(y, expected, CLOSE[dtype])
    for name, gradient in gradients.items():
        require_close(found[name], gradient, CLOSE[dtype])


@pytest.mark.parametrize("options", [{}, {"init": "pissa"}], ids=["default", "pissa"])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_no_bit(family, way, dtype, options, build):
    model, args = build(family, way, dtype), inputs(dtype)
    expected = model(*args)
    inject(model, NAMES, r=2, **options)
    assert torch.equal(model(*args), expected)
    randomize_adapters(model)
    assert not torch.equal(model(*args), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_of_the_size_of_one_expert_is_made_than_without_adapters(family, way, dtype, build):
    model, args = build(family, way, dtype), inputs(dtype)
    made = []
    for adapted in (False, True):
        if adapted:
            inject(model, NAMES, r=1)
            randomize_adapters(model)
        with Made(model, H * M) as watched:
            step(model, *args)
        made.append(watched.shapes)
    assert made[0] == made[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_products_keep_no_casts_of_adapters_and_no_product_that_can_be_made_again(
    family, build
):
    model, args = build(family, "grouped_mm", torch.bfloat16), inputs(torch.bfloat16, 8)
    least, rows = bytes_kept(lambda: model(*args)), 8 * TOP
    inject(model, NAMES, r=8)
    assert model.down_proj_lora_A.dtype == torch.float32
    randomize_adapters(model)
    for p in trained(model).values():
        p.requires_grad_(True)
    kept = bytes_kept(lambda: model(*args))
    # The rows of the first product, both A x and the places of the rows; of what the second one
    # reads the factors, act(gate) and up, are kept anyway.
    assert kept - least <= 2 * rows * (H + 2 * 8) + 2 * 8 * rows


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast(family, way, build):
    model, args = build(family, way), inputs()
    inject(model, NAMES, r=3)
    randomize_adapters(model, 0.1)
    expected, gradients = in_float64(model, *args)
    with torch.autocast(args[0].device.type, torch.bfloat16):
        y, found = step(model, *args)
    require_close(y, expected, CLOSE[torch.bfloat16])
    for name, gradient in gradients.items():
        require_close(found[name], gradient, CLOSE[torch.bfloat16])
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_under_checkpointing(way, reentrant, build):
    model, (x, *rest) = build("out_in", way), inputs()
    inject(model, NAMES, r=3)
    randomize_adapters(model, 0.1)
    _, expected = step(model, x, *rest)
    model.zero_grad()
    x.grad = None
    checkpoint(model, x, *rest, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(x.grad, expected["x"])
    for name, parameter in trained(model).items():
        assert torch.equal(parameter.grad, expected[name])


WARNINGS = ["ignore:The .grad attribute of a Tensor that is not a leaf",
            "ignore:Dynamo detected a call to a `functools.lru_cache`"]  # fmt: skip


def require_compilable(way, dtype):
    """In float32 some versions of transformers have a backward pass that loops over values."""
    own = torch.ops.transformers
    loops = hasattr(own, "grouped_mm_fallback") and not hasattr(own, "grouped_mm_fallback_backward")
    if loops and (way, dtype) == ("grouped_mm", torch.float32):
        pytest.skip("this transformers cannot be compiled there, without adapters either")


@pytest.fixture
def afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("afresh")
@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family, way, dtype, build):
    require_compilable(way, dtype)
    model, args = build(family, way, dtype), inputs(dtype)
    inject(model, NAMES, r=3)
    randomize_adapters(model, 0.1)
    expected, gradients = in_float64(model, *args)
    # The loop over experts depends on values: no single graph, with adapters or without.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=way != "eager")
    y, found = step(compiled, *args)
    require_close(y, expected, CLOSE[dtype])
    for name, gradient in gradients.items():
        require_close(found[name], gradient, CLOSE[dtype])


@pytest.mark.usefixtures("afresh")
@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize(("way", "dtype", "followed"), [
    ("batched_mm", torch.float32, True), ("batched_mm", torch.bfloat16, True),
    ("grouped_mm", torch.float32, True), ("grouped_mm", torch.bfloat16, False),
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_experts_make_and_keep_no_weight_where_a_compiler_follows_their_products(
    family, way, dtype, followed, build
):
    require_compilable(way, dtype)
    model, args = build(family, way, dtype), inputs(dtype)
    size, made, kept = E * H * M, [], []
    said = "In their weight under torch.compile, and not in products: gate_up_proj and 1 more"
    assert (said in str(plan(model, NAMES))) is not followed

    def noting(graph, values):
        def shapes():
            for node in graph.graph.nodes:
                value = node.meta.get("example_value")
                if isinstance(value, torch.Tensor) and node.op.startswith("call"):
                    yield value.numel(), value.untyped_storage()

        own = {v.untyped_storage()._cdata for n in graph.graph.nodes if n.op == "placeholder"
               if isinstance(v := n.meta.get("example_value"), torch.Tensor)}  # fmt: skip
        made.append(sum(n >= size and s._cdata not in own for n, s in shapes()))
        return graph.forward

    for adapted in (False, True):
        if adapted:
            inject(model, NAMES, r=1)
            randomize_adapters(model)
        torch.compiler.reset()
        torch.compile(model, backend=noting, fullgraph=True)(*args)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(*args)
        kept.append(bytes_kept(lambda: compiled(*args)))  # noqa: B023
    assert (made[0] == made[1]) is followed
    assert (kept[1] - kept[0] < size * dtype.itemsize) is followed


@pytest.mark.usefixtures("afresh")
@pytest.mark.filterwarnings(*WARNINGS)
def test_compiled_experts_do_not_train_with_dropout_where_no_compiler_follows_their_products(build):
    model, args = build("out_in", "eager"), inputs()
    inject(model, NAMES, r=3, dropout=0.5)
    randomize_adapters(model, 0.1)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(LoRAInjectError, match=r"leave the experts out of torch\.compile"):
        compiled(*args)
    torch.testing.assert_close(compiled.eval()(*args), model.eval()(*args))


@pytest.mark.usefixtures("afresh")
@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_compiled_experts_train_with_dropout_of_what_they_multiply(way, build):
    model, args = build("out_in", way), inputs()
    inject(model, NAMES, r=3, dropout=0.5)
    randomize_adapters(model, 0.1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(5)
    found = compiled(*args)
    torch.manual_seed(5)
    torch.testing.assert_close(found, model(*args))
    assert not torch.equal(found, compiled(*args))
    torch.testing.assert_close(compiled.eval()(*args), model.eval()(*args))


class Watched(nn.Module):
    """A fused weight (E, in, out), read by a function that says what it got."""

    def __init__(self):
        super().__init__()
        self.is_transposed = True
        self.w = nn.Parameter(torch.randn(3, 4, 5))
        self.read = []


class Multiplying(Watched):
    def forward(self, x):
        self.read.append(type(self.w))
        return x @ self.w[1]


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(x)
        return x @ W

    @staticmethod
    def backward(ctx, gradient):
        return None, ctx.saved_tensors[0].mT @ gradient


class Unknown(Watched):
    def forward(self, x):
        self.read.append(type(self.w))
        return Product.apply(x, self.w[1])


class Several(Watched):
    def forward(self, x):
        with torch.no_grad():
            length = (x @ self.w[0]).norm()
        weights = self.w
        return torch.cat([
            x @ self.w[0], x.matmul(self.w[torch.tensor(1)]), (self.w[2].t() @ x.T).T,
            F.linear(x, self.w[-1].T, x.new_ones(5)), x @ weights[1:][0] / length,
            torch.einsum("ni,io->no", x, self.w[1]), torch.bmm(x.expand(3, 2, 4), self.w).sum(0),
            x @ self.w.mT.transpose(1, 2)[0], torch.mm(x, self.w[2]), (x @ self.w).mean(0),
            x @ self.w[0, :], x @ self.w[0].detach(), x @ self.w[self.w[:, 0, 0] > 9].sum(0),
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("build", "options", "read", "words"),
    [
        (Multiplying, {}, MultipliedWeight, "in products with its weight"),
        (Multiplying, {"variant": "dora"}, ExpertWeights, "in its weight"),
        (Unknown, {}, ExpertWeights, "in its weight"),
    ],
)
def test_where_no_product_is_known_the_effective_weight_stays_and_plan_says_so(
    build, options, read, words
):
    model, x = nn.Sequential(build()), torch.randn(2, 4)
    shown = plan(model, "0.w", r=2, **options)
    assert words in " ".join(str(shown).split())
    assert [site.multiplies for site in shown.sites] == [read is MultipliedWeight]
    shown.apply()
    randomize_adapters(model)
    effective = torch.stack(list(model[0].w))
    torch.testing.assert_close(model(x), x @ effective[1])
    assert model[0].read == [read]
    model(x).sum().backward()
    assert model[0].w_lora_A.grad[1].any()
    assert model[0].w_lora_B.grad[1].any()


@pytest.mark.parametrize("function", ["sonicmoe", "deepgemm", "somebody's own"])
def test_functions_for_experts_that_may_do_anything_get_the_effective_weight(function, build):
    model = build("out_in", "eager")
    assert all(site.multiplies for site in plan(model, NAMES).sites)
    model.config._experts_implementation = function
    assert not any(site.multiplies for site in plan(model, NAMES).sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_acts_on_what_experts_multiply(family, way, dtype, build, monkeypatch):
    model, args = build(family, way, dtype), inputs(dtype)
    base = model(*args)
    inject(model, NAMES, r=3, dropout=0.5)
    assert torch.equal(model.train()(*args), base)  # B is zero
    randomize_adapters(model, 0.1)
    expected, gradients = in_float64(model, *args)
    require_close(model.eval()(*args), expected, CLOSE[dtype])
    one, other = (model.train()(*args) for _ in range(2))
    assert not torch.equal(one, other)
    seen = []

    def dropout(x, p):
        seen.append((x.shape[-1 if x.shape[-1] > 1 else -2], p))
        return x

    monkeypatch.setattr(F, "dropout", dropout)
    y, found = step(model, *args)
    require_close(y, expected, CLOSE[dtype])
    for name, gradient in gradients.items():
        require_close(found[name], gradient, CLOSE[dtype])
    assert set(seen) == {(H, 0.5)}  # the features of x, and no weight
    calls = 2 if way != "eager" else 2 * len(args[1].unique())
    assert len(seen) == calls


def test_dropout_is_masked_and_scaled_as_elsewhere():
    class Whole(Watched):
        def forward(self, x):
            return x @ self.w[1]

    model, x = Whole(), torch.eye(4)
    inject(model, "w", r=2, dropout=0.25)
    randomize_adapters(model)
    rows = (model.eval()(x) - x @ model._parameters["w"][1]).detach()
    torch.manual_seed(3)
    dropped = (model.train()(x) - x @ model._parameters["w"][1]).detach()
    torch.manual_seed(3)
    torch.testing.assert_close(dropped, F.dropout(x, 0.25) @ rows)


@pytest.mark.parametrize(("build", "options"), [(Unknown, {}), (Multiplying, {"variant": "dora"})])
def test_dropout_is_refused_where_no_product_is_known(build, options):
    with pytest.raises(UnsupportedLayerError, match="there is no input for dropout"):
        inject(nn.Sequential(build()), "0.w", r=2, dropout=0.1, **options)


def test_where_dropout_cannot_act_after_all_training_is_refused_and_evaluation_is_not():
    class Partly(Watched):
        def forward(self, x):
            return x @ self.w[1] if x.ndim == 2 else torch.einsum("i,io->o", x, self.w[1])

    model = Partly()
    inject(model, "w", r=2, dropout=0.1)
    randomize_adapters(model)
    assert model(torch.randn(2, 4)).shape == (2, 5)
    with pytest.raises(LoRAInjectError, match="w is read here, and not just multiplied by"):
        model(torch.randn(4))
    assert model.eval()(torch.randn(4)).shape == (5,)


def test_where_another_function_runs_the_experts_dropout_is_refused_in_training(build):
    model, args = build("out_in", "eager"), inputs()
    inject(model, NAMES, r=2, dropout=0.1)
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(LoRAInjectError, match="experts_implementation"):
        model(*args)


def test_an_adapter_with_dropout_comes_back_with_it(build, tmp_path):
    model = nn.ModuleDict({"experts": build("out_in", "grouped_mm")})
    inject(model, ["experts.down_proj"], r=2, dropout=0.1)
    randomize_adapters(model)
    save(model, tmp_path)
    other = strip(copy.deepcopy(model))
    load(other, tmp_path)
    (adapter,) = other["experts"].lora_adapters
    assert adapter.settings.dropout == 0.1


def test_every_form_of_a_product_and_what_is_none():
    model, x = Several().double(), torch.randn(2, 4).double()
    inject(model, "w", r=2)
    randomize_adapters(model)
    plain = Several().double()
    whole = model._parameters["w"] + (model.w_lora_B @ model.w_lora_A).mT
    expected = functional_call(plain, {"w": whole}, (x,))
    gradients = torch.autograd.grad(expected.pow(2).sum(), list(trained(model).values()))
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.pow(2).sum().backward()
    for parameter, gradient in zip(trained(model).values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_experts_that_are_known_by_one_gradient_record_know_the_other():
    class Mixed(Watched):
        def forward(self, x):
            weights = self.w
            with torch.no_grad():
                x = x + (x @ weights[0]).sum() + weights.sum()
            return x @ self.w[1] + weights.mean(0).sum()

    model = Mixed()
    inject(model, "w", r=2)
    randomize_adapters(model)
    model(torch.randn(2, 4)).sum().backward()
    assert model.w_lora_A.grad[0].any()  # of the mean
    assert model.w_lora_A.grad[1].any()
