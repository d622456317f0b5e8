"""LoHa, LoKr, Tucker and DoRA by columns: what the tests of every method do not reach."""

import copy

import pytest
import torch
from stored_models import Tied
from torch import nn

from lora_inject import (
    LoRAInjectError,
    combine,
    inject,
    load_lora_state_dict,
    lora_state_dict,
    merge,
    param_groups,
    per_row,
    plan,
    report,
    strip,
    use,
)
from lora_inject.core.state import adapters_of
from lora_inject.variants import VARIANTS, LoHa, LoKr
from lora_inject.variants.lokr import Factors

pytestmark = pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted")
IN_THE_WEIGHT = [name for name, variant in VARIANTS.items() if variant.way == "weight"]
KERNELS = {
    "one dimension": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, dilation=2), (2, 4, 8, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "three dimensions": (lambda: nn.Conv3d(4, 6, (1, 3, 2), stride=2), (1, 4, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 5)),
}


def moved(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(0.3 * noise)
    return model


def cored(A, B, mid):
    """(out, in, *kernel) of B (out, r), mid (r, r, *kernel) and A (r, in)."""
    return torch.einsum("or,rs...,si->oi...", B, mid, A)


def change_of(layer, variant):
    """The change before scaling as (out, in / groups, *kernel), written out."""
    own = {name.removeprefix("lora_"): p for name, p in layer.named_parameters() if "lora_" in name}
    if variant == "tucker":
        return cored(own["A"].flatten(1), own["B"].flatten(1), own["mid"])
    if variant == "loha":
        first = cored(own["A"], own["B"], own["mid"])
        return first * cored(own["A2"], own["B2"], own["mid2"])
    w1 = own["B"] @ own["B2"]
    w2 = cored(own["A"], own["A2"], own["mid"])
    return torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.dim() - 2)), w2.contiguous())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "variant", ["tucker", LoHa(cores=True), LoKr(given=Factors(2, 2, True, True, True))]
)
def test_cores_of_every_kernel_are_the_formula(variant, kernel):
    torch.manual_seed(0)
    build, shape = KERNELS[kernel]
    layer, x = build().double(), torch.randn(shape, dtype=torch.float64)
    if layer.in_channels // layer.groups % 2:
        pytest.fail("it would not divide")
    base, name = copy.deepcopy(layer), getattr(variant, "name", variant)
    expected = base(x)
    inject(layer, type(layer), r=2, alpha=3, variant=variant)
    assert torch.equal(layer(x), expected)
    moved(layer)
    change = change_of(layer, name)
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out / groups, *kernel), group by group
        change = torch.cat([c.transpose(0, 1) for c in change.chunk(layer.groups)])
    theirs = torch.func.functional_call(base, {"weight": base.weight + 1.5 * change}, x)
    torch.testing.assert_close(layer(x), theirs, rtol=1e-9, atol=1e-10)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    pairs = zip(
        torch.autograd.grad(layer(x).sin().sum(), parameters),
        torch.autograd.grad(theirs.sin().sum(), parameters),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    merge(layer)
    torch.testing.assert_close(layer(x), theirs, rtol=1e-9, atol=1e-10)
    strip(layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("variant", ["lokr", LoKr(both=True), LoKr(factor=4), LoKr(factor=5)])
def test_a_rank_decides_which_factors_of_a_lokr_are_whole(variant, r):
    layer = nn.Linear(36, 24)
    inject(layer, nn.Linear, r=r, variant=variant)
    (adapter,) = adapters_of(layer)
    (o1, i1), (o2, i2) = {-1: ((4, 6), (6, 6)), 4: ((4, 4), (6, 9)), 5: ((4, 4), (6, 9))}[
        adapter.settings.variant.factor
    ]
    shapes = {name: tuple(layer.get_parameter(name).shape) for name in adapter.parameters}
    first = {"lora_B": (o1, i1)}
    if adapter.settings.variant.both and r < max(o1, i1) / 2:
        first = {"lora_B": (o1, r), "lora_B2": (r, i1)}
    second = {"lora_A": (r, i2), "lora_A2": (o2, r)}
    if r >= max(o2, i2) / 2:
        second = {"lora_A": (o2, i2)}
    assert shapes == {**first, **second}
    assert report(layer).trainable == sum(p.numel() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", IN_THE_WEIGHT)
def test_what_acts_in_the_weight_alone_says_what_to_leave_out(variant):
    layer = nn.Conv1d(4, 6, 3)
    for arguments, message in (
        ({"dropout": 0.1}, "no input for dropout=0.1"),
        ({"init": "pissa"}, r"Leave out init= and fixed="),
        ({"init": "gaussian"}, r"Leave out init= and fixed="),
        ({"fixed": "A"}, r"Leave out init= and fixed="),
    ):
        if variant == "dora_columns" and "dropout" not in arguments:
            continue  # it has an A and a B, which may begin and stay as any
        with pytest.raises(LoRAInjectError, match=message):
            inject(layer, nn.Conv1d, r=2, variant=variant, **arguments)
    inject(layer, nn.Conv1d, r=2)
    with pytest.raises(LoRAInjectError, match=r"acts beside its forward.*in its weight.*how="):
        inject(layer, nn.Conv1d, r=2, variant=variant, adapter="other")
    strip(layer)
    inject(layer, nn.Conv1d, r=2, variant=variant)
    assert [a.way for a in adapters_of(layer)] == ["weight"]
    inject(layer, nn.Conv1d, r=2, how="weight", adapter="other")
    assert len(adapters_of(layer)) == 2
    with (
        pytest.raises(LoRAInjectError, match="in its weight, which all"),
        per_row(layer, ["default"]),
    ):
        pass


def test_an_object_of_a_variant_is_one_and_a_word_must_be_known():
    layer = nn.Linear(8, 8)
    assert "loha" in str(plan(layer, nn.Linear, variant=LoHa()))
    inject(layer, {nn.Linear: {"variant": LoKr(factor=2)}}, r=1, scaling="rslora", alpha=3)
    (adapter,) = adapters_of(layer)
    assert adapter.settings.variant.factor == 2
    assert adapter.settings.scaling == 3
    assert "lokr, rslora" in repr(layer)
    with pytest.raises(LoRAInjectError, match=r"variant must be one of .*'loha'.*not 'loah'"):
        inject(nn.Linear(2, 2), nn.Linear, variant="loah")


@pytest.mark.parametrize("variant", ["loha", "tucker"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_product_of_low_rank_combines_exactly(variant, groups):
    torch.manual_seed(0)
    layer, x = nn.Conv1d(4, 6, 3, groups=groups).double(), torch.randn(2, 4, 7).double()
    for seed, name in enumerate(("one", "two")):
        inject(layer, nn.Conv1d, r=2, alpha=3, variant=variant, adapter=name, seed=seed)
        use(layer, name)
        moved(layer, seed)
    use(layer, {"one": 0.7, "two": -0.4})
    expected = layer(x)
    combine(layer, {"one": 0.7, "two": -0.4}, name="both", how="cat")
    use(layer, "both")
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-10)
    assert adapters_of(layer)[-1].settings.variant.name == "lora"


def test_what_is_no_product_of_low_rank_is_not_combined():
    layer = nn.Linear(8, 6)
    inject(layer, nn.Linear, r=2, variant="lokr")
    with pytest.raises(LoRAInjectError, match=r"lokr, which is no product of low rank.*use\("):
        combine(layer, {"default": 1.0}, name="both", how="svd")


@pytest.mark.parametrize("variant", IN_THE_WEIGHT)
def test_state_dicts_have_every_tensor_and_fill_it_again(variant):
    layers = [nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 4, 7)
    for layer in layers:
        inject(layer, nn.Conv1d, r=2, variant=variant)
    moved(layers[0])
    state = {key: tensor.clone() for key, tensor in lora_state_dict(layers[0]).items()}
    assert set(state) == set(adapters_of(layers[0])[0].parameters)
    load_lora_state_dict(layers[1], state)
    assert torch.equal(layers[1](x), layers[0](x))
    state["lora_A"] = state["lora_A"][:1]
    with pytest.raises(LoRAInjectError, match=r"of another shape \(lora_A"):
        load_lora_state_dict(layers[1], state)


def test_tied_layers_share_a_loha_and_refuse_what_has_rows_and_columns(tmp_path):
    tokens, model = torch.tensor([[1, 2]]), Tied()
    expected = model(tokens)
    inject(model, "emb", r=2, variant="loha")
    assert torch.equal(model(tokens), expected)
    moved(model)
    own = {name: model.emb.get_parameter(f"lora_{name}") for name in ("A", "B", "A2", "B2")}
    change = ((own["B"] @ own["A"]) * (own["B2"] @ own["A2"])).T
    base = strip(copy.deepcopy(model))
    values = {"emb.weight": base.emb.weight + change}
    theirs = torch.func.functional_call(base, values, (tokens,), tie_weights=True)
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-5, atol=1e-6)
    state = {key: tensor.clone() for key, tensor in lora_state_dict(model).items()}
    changed = model(tokens)
    load_lora_state_dict(model, state)
    assert torch.equal(model(tokens), changed)
    strip(model)
    assert torch.equal(model(tokens), expected)
    for variant in ("lokr", "dora_columns"):
        with pytest.raises(LoRAInjectError, match=r"emb: its weight is tied.*columns.*Untie them"):
            inject(model, "emb", r=2, variant=variant)


@pytest.mark.parametrize("variant", IN_THE_WEIGHT)
def test_an_optimizer_gets_every_tensor_once_and_magnitudes_do_not_decay(variant):
    layer = nn.Conv1d(4, 6, 3)
    inject(layer, nn.Conv1d, r=2, variant=variant)
    groups = param_groups(layer, 1e-3, weight_decay=0.1)
    named = {group["name"]: group for group in groups}
    assert set(named) == set(adapters_of(layer)[0].parameters)
    assert sum(len(group["params"]) for group in groups) == len(named)
    if variant == "dora_columns":
        assert named["lora_magnitude"]["weight_decay"] == 0


@pytest.mark.parametrize("variant", IN_THE_WEIGHT)
def test_it_compiles_as_one_graph(variant):
    torch.manual_seed(0)
    layer, x = nn.Conv1d(4, 6, 3), torch.randn(2, 4, 7)
    inject(layer, nn.Conv1d, r=2, variant=variant)
    moved(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
