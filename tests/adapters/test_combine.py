"""combine: new adapters out of several, against float64 references and PEFT."""

import math

import pytest
import torch
from helpers import PEFT_WARNS, Net, changed_parts, paired, randomize_adapters, snapshot
from torch import nn

from lora_inject import ArgumentError, LoRAInjectError, combine, inject, merged, report, strip, use
from lora_inject.arithmetic.low_rank import product_norm, truncated
from lora_inject.core.state import adapters_of

pytestmark = pytest.mark.usefixtures("device")

WEIGHTS = {"a": 0.7, "b": -0.4}
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "embedding": lambda: nn.Embedding(9, 5),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "attention": lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5),
    "lstm": lambda: nn.LSTM(4, 5),
}


def pair(layer, ranks=(2, 3)):
    """A layer in double precision with two adapters that have values."""
    model = nn.ModuleList([layer]).double()
    for name, r in zip(("a", "b"), ranks, strict=True):
        inject(model, type(layer), r=r, alpha=1.5 * r, adapter=name)
    randomize_adapters(model, names=["a", "b"])
    return model


def updates(model, name):
    """The scaled update of every weight, as merging would add it."""
    (layer,) = model
    found = {}
    for adapter in adapters_of(layer):
        for spec, (A, B) in paired(adapter) if adapter.name == name else ():
            W = layer._parameters[spec.weight]
            A, B = layer.get_parameter(A), layer.get_parameter(B)
            update = adapter.kind.update(layer, W, spec, A, B) * adapter.settings.scaling
            found[spec.weight] = update.detach()
    return found


def weighted(model):
    return {
        weight: sum(w * updates(model, name)[weight] for name, w in WEIGHTS.items())
        for weight in updates(model, "a")
    }


@pytest.mark.parametrize("kind", LAYERS)
def test_cat_is_the_weighted_sum(kind):
    torch.manual_seed(0)
    model = pair(LAYERS[kind]())
    result = combine(model, WEIGHTS, "ab")
    assert result.worst < 1e-12
    assert [(layer.path, layer.r) for layer in result.layers] == [("0", 5)]
    for weight, expected in weighted(model).items():
        torch.testing.assert_close(updates(model, "ab")[weight], expected, msg=weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_svd_is_the_best_of_its_rank(kind):
    torch.manual_seed(0)
    model = pair(LAYERS[kind]())
    result = combine(model, WEIGHTS, "ab", how="svd", r=5)
    assert result.worst < 1e-12  # of full rank it is the sum
    for weight, expected in weighted(model).items():
        torch.testing.assert_close(updates(model, "ab")[weight], expected, msg=weight)
    lost = combine(model, WEIGHTS, "small", how="svd", r=1).worst
    default = combine(model, WEIGHTS, "default_rank", how="svd")
    assert default.layers[0].r == 3
    assert 0 < default.worst < lost < 1
    if kind == "linear":
        values = torch.linalg.svdvals(weighted(model)["weight"])
        assert lost == pytest.approx(values[1:].norm().item() / values.norm().item())


def test_linear_by_hand():
    torch.manual_seed(0)
    model = pair(nn.Linear(6, 5), ranks=(2, 2))
    combine(model, WEIGHTS, "ab", how="linear")
    (layer,) = model
    roots = {name: math.sqrt(abs(w) * 1.5) for name, w in WEIGHTS.items()}
    A = roots["a"] * layer.lora_A_a - roots["b"] * layer.lora_A_b
    B = roots["a"] * layer.lora_B_a + roots["b"] * layer.lora_B_b
    torch.testing.assert_close(layer.lora_A_ab, A)
    torch.testing.assert_close(layer.lora_B_ab, B)


def test_dare_keeps_and_rescales():
    torch.manual_seed(0)
    layer = nn.Linear(400, 300)
    model = nn.ModuleList([layer])
    inject(model, nn.Linear, r=8, adapter="a")
    randomize_adapters(model, names=["a"])
    combine(model, {"a": 1.0}, "kept", how="dare", density=0.3, seed=1)
    kept = layer.lora_A_kept != 0
    assert kept.float().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(layer.lora_A_kept[kept], (layer.lora_A_a / 0.3)[kept])
    combine(model, {"a": 1.0}, "again", how="dare", density=0.3, seed=1)
    combine(model, {"a": 1.0}, "all", how="dare", density=1.0)
    assert not torch.equal(layer.lora_A_again, layer.lora_A_kept)  # the name is part of the seed
    torch.testing.assert_close(layer.lora_A_all, layer.lora_A_a)


@PEFT_WARNS
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"how": "cat"}, {"combination_type": "cat"}),
        ({"how": "svd"}, {"combination_type": "svd"}),
        ({"how": "svd", "r": 2}, {"combination_type": "svd", "svd_rank": 2}),
        ({"how": "linear"}, {"combination_type": "linear"}),
        ({"how": "ties", "density": 0.5}, {"combination_type": "ties", "density": 0.5}),
        ({"how": "dare", "density": 1.0}, {"combination_type": "dare_linear", "density": 1.0}),
    ],
    ids=lambda value: value.get("how", ""),
)
def test_as_peft(kind, ours, theirs):
    import peft

    torch.manual_seed(0)
    layer = {
        "linear": lambda: nn.Linear(6, 5),
        "embedding": lambda: nn.Embedding(9, 5),
        "conv": lambda: nn.Conv2d(4, 6, 3),
    }[kind]()
    model = nn.Sequential(layer)
    other = peft.get_peft_model(
        nn.Sequential(type(layer)(6, 5) if kind == "linear" else LAYERS_LIKE[kind]()),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
        adapter_name="a",
    )
    other.add_adapter("b", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"]))
    wrapped = other.base_model.model[0]
    for name, alpha in (("a", 6), ("b", 3)):
        inject(model, "0", r=3, alpha=alpha, adapter=name)
    randomize_adapters(model, names=["a", "b"])
    own = (wrapped.lora_embedding_A, wrapped.lora_embedding_B)
    if kind != "embedding":
        own = [{n: m.weight for n, m in d.items()} for d in (wrapped.lora_A, wrapped.lora_B)]
    with torch.no_grad():
        for name in ("a", "b"):
            own[0][name].copy_(layer.get_parameter(f"lora_A_{name}"))
            own[1][name].copy_(layer.get_parameter(f"lora_B_{name}"))
    other.add_weighted_adapter(["a", "b"], list(WEIGHTS.values()), adapter_name="ab", **theirs)
    combine(model, WEIGHTS, "ab", **ours)
    A, B = layer.lora_A_ab.detach(), layer.lora_B_ab.detach()
    made = adapters_of(layer)[-1]
    update = made.kind.update(layer, layer.weight, made.specs[0], A, B)
    torch.testing.assert_close(
        update, wrapped.get_delta_weight("ab").reshape(update.shape), atol=1e-5, rtol=1e-4
    )


LAYERS_LIKE = {"embedding": lambda: nn.Embedding(9, 5), "conv": lambda: nn.Conv2d(4, 6, 3)}


def test_nothing_runs_or_trains_until_it_is_used():
    torch.manual_seed(0)
    model, x = Net(), torch.randint(11, (2, 5))
    before = snapshot(model)
    for name, targets in (("a", ["q_proj", "v_proj"]), ("b", ["v_proj", "o_proj"])):
        inject(model, targets, r=2, adapter=name)
    randomize_adapters(model, names=["a", "b"])
    use(model, {"a": 0.7, "b": 0.3})
    output = model(x)
    result = combine(model, {"a": 0.7, "b": 0.3}, "ab")
    assert {layer.path.split(".")[-1]: layer.r for layer in result.layers} == {
        "q_proj": 2, "v_proj": 4, "o_proj": 2,
    }  # fmt: skip
    assert "off the weighted sum" in str(result)
    assert torch.equal(model(x), output)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("_ab"))
    use(model, "ab")
    torch.testing.assert_close(model(x), output)
    assert {n.rsplit("_", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"ab"}
    with merged(model):
        torch.testing.assert_close(model(x), output)
    assert {row.adapter for row in report(model).patterns} == {"a", "b", "ab"}
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_parts_and_tied_weights():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 9)])
    inject(model, "0", r=2, adapter="a", parts={"0": ("q", None, "v")})
    inject(model, "0", r=2, adapter="b", parts={"0": (None, None, "v")})
    randomize_adapters(model, names=["a", "b"])
    x = torch.randn(3, 4)
    use(model, {"a": 0.7, "b": 0.3})
    expected = model[0](x)
    combine(model, {"a": 0.7, "b": 0.3}, "ab")
    use(model, "ab")
    torch.testing.assert_close(model[0](x), expected)
    assert model[0].q_lora_A_ab.shape == model[0].v_lora_A_ab.shape == (4, 4)

    tied = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    tied["head"].weight = tied["embed"].weight
    inject(tied, "embed", r=2, adapter="a")
    inject(tied, "head", r=3, adapter="b")
    randomize_adapters(tied, names=["a", "b"])

    def run():
        return tied["head"](tied["embed"](torch.arange(7)))

    use(tied, {"a": 0.7, "b": 0.3})
    expected = run()
    assert len(combine(tied, {"a": 0.7, "b": 0.3}, "ab").layers) == 1
    use(tied, "ab")
    torch.testing.assert_close(run(), expected)
    strip(tied)
    assert tied["head"].weight is tied["embed"].weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"c": 1.0}, "ab"), "no adapter 'c'"),
        (({}, "ab"), "at least one"),
        ((["a", "b"], "ab"), "must be a mapping"),
        (({"a": math.inf}, "ab"), "finite"),
        (({"a": 1.0}, "b"), "'b' already"),
        (({"a": 1.0}, "a b"), "letters, digits"),
        (({"a": 1.0}, "ab", "mean"), "how must be one of"),
        (({"a": 1.0, "b": 1.0}, "ab", "linear"), r"0: .*equal ranks, not \[2, 3\]"),
        (({"a": 1.0}, "ab", "ties"), "density"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_change_nothing(arguments, message):
    model = pair(nn.Linear(6, 5))
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=message):
        combine(model, *arguments)
    for options in ({"r": 2}, {"density": 0.5}, {"seed": 1}):
        with pytest.raises(ArgumentError, match="no meaning for how='cat'"):
            combine(model, WEIGHTS, "ab", **options)
    with merged(model), pytest.raises(LoRAInjectError, match="merged now"):
        combine(model, WEIGHTS, "ab")
    assert changed_parts(before, snapshot(model)) == []


def test_trained_biases_cannot_be_combined():
    model = Net()
    inject(model, "q_proj", r=2, adapter="a", bias="lora_only")
    with pytest.raises(ArgumentError, match="trained bias of a"):
        combine(model, {"a": 1.0}, "b")


def test_low_rank_products_against_dense_ones():
    torch.manual_seed(0)
    A, B = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    assert product_norm(A, B) == pytest.approx((B @ A).norm().item())
    new_A, new_B = truncated(A, B, 6)  # more than the product has
    assert (new_A.shape, new_B.shape) == ((3, 6, 9), (3, 5, 6))
    torch.testing.assert_close(new_B @ new_A, B @ A)


def test_what_has_no_value_or_two_places_is_refused():
    model = nn.ModuleList([nn.Linear(4, 12)])
    inject(model, "0", r=1, adapter="a", parts={"0": (("q", 4), (None, 8))})
    inject(model, "0", r=1, adapter="b", parts={"0": ((None, 4), ("q", 4), (None, 4))})
    with pytest.raises(LoRAInjectError, match="parts of one name in different places"):
        combine(model, {"a": 1.0, "b": 1.0}, "ab")
    with torch.no_grad():
        model[0].q_lora_A_a.fill_(float("nan"))
    for how in ("cat", "svd"):
        with pytest.raises(LoRAInjectError, match="'a' has no finite values"):
            combine(model, {"a": 1.0}, "ab", how)
    with pytest.raises(ArgumentError, match="finite number"):
        combine(model, {"b": 10**400}, "ab")
