"""Several adapters in one model: use, remove, and what each of them trained in place."""

import copy
import pickle

import pytest
import torch
from helpers import (
    Faults,
    Net,
    changed_parts,
    ids,
    linears,
    paired,
    randomize_adapters,
    snapshot,
    train_steps,
    trainable_names,
)
from torch import nn

from lora_inject import (
    AlreadyAdaptedError,
    ArgumentError,
    LoRAInjectError,
    LoRALayer,
    UnsupportedLayerError,
    combine,
    disabled,
    freeze,
    inject,
    lora_parameters,
    merge,
    merged,
    param_groups,
    remove,
    report,
    reset_lora_parameters,
    strip,
    unmerge,
    use,
)
from lora_inject.core.state import adapters_of

pytestmark = pytest.mark.usefixtures("device")


def two():
    """A double-precision net with adapters that overlap in part, both with values."""
    torch.manual_seed(0)
    model = Net(dtype=torch.float64)
    base = copy.deepcopy(model)
    inject(model, ["q_proj", "v_proj"], r=2, alpha=3, adapter="fr")
    inject(model, ["v_proj", "o_proj"], r=3, adapter="de")
    randomize_adapters(model, names=["fr", "de"])
    return model, base


def by_hand(base, model, weights):
    """The base with the weighted updates written into its weights."""
    merged_base = copy.deepcopy(base)
    with torch.no_grad():
        for path, layer in model.named_modules():
            for adapter in adapters_of(layer):
                for spec, (A, B) in paired(adapter):
                    factor = weights.get(adapter.name, 0.0) * adapter.settings.scaling
                    update = layer.get_parameter(B) @ layer.get_parameter(A)
                    merged_base.get_submodule(path).get_parameter(spec.weight).add_(factor * update)
    return merged_base


@pytest.mark.parametrize(
    ("chosen", "weights"),
    [
        (("fr",), {"fr": 1.0}),
        (("de",), {"de": 1.0}),
        (("fr", "de"), {"fr": 1.0, "de": 1.0}),
        (({"fr": 0.7, "de": -0.3},), {"fr": 0.7, "de": -0.3}),
        (({"fr": 0.0},), {}),
        ((), {}),
    ],
)
def test_use_computes_the_chosen_sum(chosen, weights):
    model, base = two()
    x = ids()
    assert use(model, *chosen) is model
    expected = by_hand(base, model, weights)(x)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    if not weights and not chosen:
        assert torch.equal(model(x), base(x))
        assert not any(isinstance(m, LoRALayer) for m in model.modules())


def test_a_second_adapter_changes_no_output_and_no_flag_of_the_first():
    model = Net()
    inject(model, "q_proj", r=2)
    randomize_adapters(model, names=["default"])
    for name, p in model.named_parameters():
        p.requires_grad_(name == "layers.0.q_proj.lora_A")  # the user's own choice
    x = ids()
    before, flags = model(x), trainable_names(model)
    inject(model, ["q_proj", "k_proj"], r=2, adapter="fr")
    assert torch.equal(model(x), before)
    added = {n for n in dict(model.named_parameters()) if n.endswith(("_A_fr", "_B_fr"))}
    assert trainable_names(model) == flags | added


def test_layers_without_an_adapter_in_use_have_their_own_class():
    model, _ = two()
    use(model, "de")
    assert type(model.layers[0].q_proj) is nn.Linear
    assert isinstance(model.layers[0].v_proj, LoRALayer)
    assert "fr(r=2, alpha=3, dropout=0, not in use)" in repr(model.layers[0].v_proj)


def test_only_adapters_in_use_train_unless_asked():
    model, _ = two()

    def training():
        return {name.rsplit("_", 1)[1] for name in trainable_names(model)}

    use(model, "fr")
    assert training() == {"fr"}
    use(model, "fr", "de", train="de")
    assert training() == {"de"}
    train_steps(model, ids(), steps=1)
    use(model, "fr", train=["fr", "de"])
    assert training() == {"fr", "de"}
    use(model, "fr", "de", train=())
    assert training() == set()
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(LoRAInjectError, match="no parameter"):
        lora_parameters(model)


def test_what_is_fixed_does_not_train_when_its_adapter_is_in_use_again():
    model = linears("a")
    inject(model, "a", r=1, fixed="A")
    use(use(model), "default")
    assert trainable_names(model) == {"a.lora_B"}


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_use_says_what_trains_whatever_somebody_has_set_since(bias):
    model = linears("a")
    inject(model, "a", r=1, bias=bias)
    layer = model["a"]
    for train in (None, "default"):
        layer.lora_A.requires_grad_(False)
        layer.lora_B.grad = torch.ones_like(layer.lora_B)
        use(model, "default", train=train)
        assert layer.lora_A.requires_grad
        assert layer.lora_B.grad is not None  # it trains on


def test_an_adapter_that_is_not_in_use_does_not_change_in_training():
    model, _ = two()
    use(model, "fr")
    frozen = {n: p.clone() for n, p in model.named_parameters() if n.endswith("_de")}
    train_steps(model, ids())
    assert frozen
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


def test_report_lists_every_adapter():
    model, _ = two()
    use(model, {"fr": 0.5})
    rows = {(row.pattern, row.adapter): row for row in report(model).patterns}
    assert rows["v_proj", "fr"].ranks == (2,)
    assert rows["v_proj", "de"].ranks == (3,)
    assert rows["v_proj", "fr"].weight == 0.5
    assert rows["v_proj", "de"].weight is None
    text = str(report(model))
    assert "in use" in text
    assert "0.5" in text


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_strip_with_three_adapters(bias):
    torch.manual_seed(0)
    model = Net()
    before, x = snapshot(model), ids()
    for i, name in enumerate(["default", "fr", "de"]):
        inject(model, ["q_proj", "v_proj"], r=i + 1, adapter=name, bias=bias, train_also="head")
        train_steps(model, x, steps=2)
        use(model)
    use(model, "fr")
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize("order", [["default", "fr"], ["fr", "default"]])
@pytest.mark.parametrize("used", [(), ("default",), ("fr",)])
def test_remove_is_exact(order, used):
    """After a remove the rest computes what it did, and after all of them the model is bare."""
    torch.manual_seed(0)
    model, x = Net(), ids()
    before = snapshot(model)
    outputs = {(): model(x)}
    for name in ("default", "fr"):
        inject(model, "q_proj", r=2, adapter=name, bias="all", train_also="head")
        train_steps(model, x, steps=2)
        outputs[name,] = model(x)
        use(model)
        assert torch.equal(model(x), outputs[()])
    use(model, *used)
    assert remove(model, order[0]) is model
    left = [name for name in used if name != order[0]]
    assert torch.equal(model(x), outputs[tuple(left)])
    assert order[0] not in {row.adapter for row in report(model).patterns}
    use(model, order[1])
    assert torch.equal(model(x), outputs[order[1],])
    remove(model, order[1])
    assert changed_parts(before, snapshot(model)) == []
    assert set(vars(model)) == set(vars(Net()))


def test_remove_refuses_what_it_does_not_know():
    model, _ = two()
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"no adapter 'es'; known: \['de', 'fr'\]"):
        remove(model, ["fr", "es"])
    with merged(model), pytest.raises(LoRAInjectError, match="merged now"):
        remove(model, "fr")
    with disabled(model), pytest.raises(LoRAInjectError, match="disabled block"):
        remove(model, "fr")
    assert changed_parts(before, snapshot(model)) == []


class Normed(nn.Module):
    """A trunk, and a head with running statistics that can train in full."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.trunk(x))


def test_what_an_adapter_trained_in_place_is_swapped_in_and_out_exactly():
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(6, 4)
    eval_output = {}

    def output(module):
        module.eval()
        result = module(x)
        module.train()
        return result

    eval_output[None] = output(model)
    head = list(model.head.parameters())
    for name in ("a", "b"):
        use(model) if name == "b" else None
        inject(model, "trunk", r=2, adapter=name, bias="lora_only", train_also="head")
        train_steps(model, x, steps=3)
        eval_output[name] = output(model)
    assert not torch.equal(eval_output["a"], eval_output["b"])
    for name in ("a", "b", None, "b", None, "a", "b", "a"):
        use(model, *([name] if name else []))
        assert torch.equal(output(model), eval_output[name]), name
    own = [*model.head[0].parameters(recurse=False), *model.head[1].parameters(recurse=False)]
    assert {id(p) for p in head} <= {id(p) for p in own}  # the first adapter trains the base's own
    moved = model.head[0].num_batches_tracked.clone()
    use(model)
    model(x)
    use(model, "a")
    assert torch.equal(model.head[0].num_batches_tracked, moved)  # nobody trained meanwhile


def test_optimizer_states_stay_with_their_tensors():
    """Each adapter trains Parameters of its own, so that an optimizer for each goes on working."""
    torch.manual_seed(0)
    model, x = Net(), ids()
    inject(model, "q_proj", r=2, adapter="a", bias="all")
    optimizers = {"a": torch.optim.Adam(lora_parameters(model))}
    use(model)
    inject(model, "q_proj", r=2, adapter="b", bias="all")
    optimizers["b"] = torch.optim.Adam(lora_parameters(model))
    shared = [
        {id(p) for group in o.param_groups for p in group["params"]} for o in optimizers.values()
    ]
    assert not shared[0] & shared[1]
    for name in ("a", "b", "a", "b"):
        use(model, name)
        optimizer = optimizers[name]
        inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert inside == {id(p) for p in model.parameters() if p.requires_grad}
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {g["name"] for g in param_groups(model, 1e-3)} == {"lora_A", "lora_B", "bias"}


def test_a_graph_made_with_one_adapter_survives_a_swap():
    model, x = Net(), ids()
    inject(model, "q_proj", r=2, adapter="a", train_also="head")
    loss = model(x).square().sum()
    use(model)
    reference = model(x).detach()
    use(model, "a")
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert reference.shape == (2, 5, 3)


def test_what_cannot_be_combined_is_refused():
    model = Net()
    inject(model, "q_proj", r=2, adapter="a", bias="lora_only")
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"'b' is to train .*'a' has trained.*use\(model\)"):
        inject(model, "q_proj", r=2, adapter="b", bias="lora_only")
    assert changed_parts(before, snapshot(model)) == []
    use(model)
    inject(model, "q_proj", r=2, adapter="b", bias="lora_only")
    with pytest.raises(ArgumentError, match="both trained bias of a"):
        use(model, "a", "b")
    with pytest.raises(ArgumentError, match="cannot count with a weight"):
        use(model, {"a": 0.5})
    use(model, {"a": 1.0})
    inject(model, "k_proj", r=2, adapter="c")
    use(model, "a", "c")
    with pytest.raises(ArgumentError, match="2 adapters are in use"):
        freeze(model, bias="all")


def test_conflicts_between_adapters_on_one_layer():
    model = Net()
    inject(model, "q_proj", r=2)
    with pytest.raises(AlreadyAdaptedError, match="already carries the adapter 'default'"):
        inject(model, "q_proj", r=2)
    with pytest.raises(UnsupportedLayerError, match=r"'default' acts beside its forward, and 'w'"):
        inject(model, "q_proj", r=2, adapter="w", how="weight")
    with pytest.raises(ArgumentError, match="must not be 'base'"):
        inject(model, "q_proj", r=2, adapter="base")
    with pytest.raises(ArgumentError, match=r"was injected with bias='none'"):
        inject(model, "k_proj", r=2, bias="all")


@pytest.mark.parametrize(
    "bad",
    [("es",), (5,), ({"fr": "x"},), ({"fr": float("nan")},), ({"fr": True},), (["fr", "de"],)],
    ids=repr,
)
def test_use_refuses_bad_arguments(bad):
    model, _ = two()
    before = snapshot(model)
    with pytest.raises(ArgumentError):
        use(model, *bad)
    with pytest.raises(ArgumentError):
        use(model, "fr", train="es")
    assert changed_parts(before, snapshot(model)) == []


def test_use_needs_adapters_that_can_be_swapped():
    with pytest.raises(LoRAInjectError, match="no adapters"):
        use(Net(), "fr")
    model, _ = two()
    use(model.layers[0], "fr")  # a part
    assert report(model).patterns != report(two()[0]).patterns
    use(model, "fr", "de")
    with merged(model), pytest.raises(LoRAInjectError, match="merged now"):
        use(model, "fr")
    with disabled(model), pytest.raises(LoRAInjectError, match="disabled block"):
        use(model, "fr")


def test_merge_a_subset_and_the_rest_later():
    model, base = two()
    x = ids()
    both = model(x)
    merge(model, "fr")
    assert type(model.layers[0].q_proj) is nn.Linear  # all of its adapters are folded
    torch.testing.assert_close(model(x), both, atol=1e-12, rtol=1e-12)
    assert isinstance(model.layers[0].v_proj, LoRALayer)
    merge(model, ["de"])
    assert not any(isinstance(m, LoRALayer) for m in model.modules())
    torch.testing.assert_close(
        model(x), by_hand(base, model, {"fr": 1.0, "de": 1.0})(x), atol=1e-12, rtol=1e-12
    )
    in_steps = model(x)
    unmerge(model)
    with merged(model):  # the second step summed anew from the former weights
        assert torch.equal(model(x), in_steps)
    merge(model)
    with pytest.raises(LoRAInjectError, match="merged now"):
        merge(model)
    unmerge(model)
    assert torch.equal(model(x), both)
    with pytest.raises(ArgumentError, match="'es' is not in use"):
        merge(model, "es")
    use(model, {"fr": 0.5})
    with pytest.raises(ArgumentError, match="'de' is not in use"):
        merge(model, "de")
    with merged(model, "fr"):
        torch.testing.assert_close(model(x), by_hand(base, model, {"fr": 0.5})(x))


def test_strip_folds_what_is_in_use():
    model, base = two()
    x = ids()
    expected = by_hand(base, model, {"fr": 0.25, "de": 1.0})(x)
    use(model, {"fr": 0.25, "de": 1.0})
    merge(model, "de")
    strip(model, merge=True)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    assert set(model.state_dict()) == set(base.state_dict())


def test_strip_with_merge_keeps_what_the_adapter_in_use_trained():
    torch.manual_seed(0)
    model, x = Net(), ids()
    parameters = list(model.parameters())
    for name in ("a", "b"):
        use(model) if name == "b" else None
        inject(model, "q_proj", r=2, adapter=name, bias="all")
        train_steps(model, x)
    trained = model(x)
    strip(model, merge=True)
    torch.testing.assert_close(model(x), trained)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_their_own_adapters(how):
    torch.manual_seed(0)
    model, x = Net(), ids()
    before = [t.clone() for t in model.state_dict().values()]
    for name in ("a", "b"):
        inject(model, "q_proj", r=2, adapter=name, bias="all")
        train_steps(model, x)
        output = model(x)
        use(model)
    twin = how(model)
    assert torch.equal(use(twin, "b")(x), output)
    train_steps(twin, x)
    assert torch.equal(use(model, "b")(x), output)
    strip(twin)
    assert all(torch.equal(a, b) for a, b in zip(before, twin.state_dict().values(), strict=True))


def test_swapping_after_a_cast():
    torch.manual_seed(0)
    model, x = Net(), ids()
    for name in ("a", "b"):
        inject(model, "q_proj", r=2, adapter=name, bias="all", train_also="head")
        train_steps(model, x)
        use(model)
    model.to(torch.float64)
    for name in ("a", "b", "a"):
        use(model, name)
        assert model(x).dtype == torch.float64
    use(model)
    strip(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_state_dict_holds_every_adapter():
    """What waits is saved with the model and comes back with it, whatever was in use."""
    torch.manual_seed(0)
    x = ids()

    def build():
        torch.manual_seed(0)
        model = Net()
        for name in ("a", "b"):
            inject(model, "q_proj", r=2, adapter=name, bias="all", seed=1)
            use(model)
        return model

    model = build()
    outputs = {}
    for name in ("a", "b"):
        use(model, name)
        train_steps(model, x)
        outputs[name] = model(x)
    twin = use(build(), "b")
    twin.load_state_dict(model.state_dict())
    for name in ("a", "b"):
        assert torch.equal(use(twin, name)(x), outputs[name])


def test_tied_modules_that_train_are_swapped_in_all_places():
    torch.manual_seed(0)
    model = Net(dim=3)
    model.head = nn.Linear(3, 11, bias=False)
    model.head.weight = model.embed.weight
    x = ids()
    base = model(x)
    inject(model, "q_proj", r=2, adapter="a", train_also="embed")
    train_steps(model, x)
    trained = model(x)
    use(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(x), base)
    use(model, "a")
    assert torch.equal(model(x), trained)


def test_a_bias_of_an_lstm_is_swapped_where_it_is_read():
    """nn.LSTM keeps a list of its parameters beside their names."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "out": nn.Linear(4, 2)})
    x = torch.randn(5, 1, 3)

    def run():
        return model["out"](model["lstm"](x)[0])

    base = run().detach()
    inject(model, "out", r=2, bias="all")
    with torch.no_grad():
        model["lstm"].bias_ih_l0.add_(1)
    trained = run().detach()
    use(model)
    assert torch.equal(run(), base)
    use(model, "default")
    assert torch.equal(run(), trained)
    with disabled(model):
        assert torch.equal(run(), base)


def test_adapters_of_nested_calls_are_one():
    model, x = Net(), ids()
    before = snapshot(model)
    inject(model.layers, "q_proj", r=2, adapter="fr")
    inject(model, "head", r=2, adapter="de")
    randomize_adapters(model, names=["fr", "de"])
    use(model, "fr")
    only = model(x)
    use(model, "de")
    assert not torch.equal(model(x), only)
    remove(model, ["fr", "de"])
    assert changed_parts(before, snapshot(model)) == []


def test_lora_and_training_in_full_do_not_meet():
    """What one adapter trains in full is swapped, so that another's update of it would be lost."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inject(model, "0", r=1, adapter="a", train_also="1")
    use(model)
    with pytest.raises(UnsupportedLayerError, match="1: the adapter 'a' trains it in full"):
        inject(model, "1", r=1, adapter="b")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inject(other, "0", r=1, adapter="a")
    with pytest.raises(UnsupportedLayerError, match="0: train_also: the adapter 'a' stands on"):
        inject(other, "1", r=1, adapter="b", train_also="0")


def test_names_that_could_collide():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.x_bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": Two()})
    before = snapshot(model)
    for i, name in enumerate(["fr", "fr_x", "x_fr"]):
        inject(model, "a", r=1, adapter=name, bias="all")
        with torch.no_grad():
            model["b"].bias.fill_(i + 10)
            model["b"].x_bias.fill_(i + 20)
        use(model)
    for i, name in enumerate(["fr", "fr_x", "x_fr"]):
        use(model, name)
        assert (model["b"].bias[0].item(), model["b"].x_bias[0].item()) == (i + 10, i + 20)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def test_a_part_of_which_something_trains_already_trains_it_for_one_adapter_at_a_time():
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(3, 3)), "out": nn.Linear(3, 3)})
    before = snapshot(model)
    inject(model, "out", r=1, adapter="a", bias="all")
    with pytest.raises(ArgumentError, match="'a' has trained"):
        inject(model["block"], "0", r=1, adapter="b", bias="all")
    use(model)
    inject(model["block"], "0", r=1, adapter="b", bias="all")
    strip(model["block"])
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    inject(model["block"], "0", r=1)  # and it is one again
    strip(model["block"])


def test_an_adapter_that_is_not_in_use_is_not_extended():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    inject(model, "0", r=1, adapter="fr")
    for weights in ((), ({"fr": 0.5},)):
        use(model, *weights)
        with pytest.raises(ArgumentError, match="not in use with a weight of 1"):
            inject(model, "1", r=1, adapter="fr")
    use(model, "fr")
    inject(model, "1", r=1, adapter="fr")
    strip(model)
    parts = nn.ModuleList([nn.Sequential(nn.Linear(3, 3)) for _ in range(3)])
    for part in parts[:2]:
        inject(part, "0", r=1, adapter="fr")
    use(parts[0])
    inject(parts, "2.0", r=1, adapter="de")  # parts may use an adapter differently
    assert [isinstance(part[0], LoRALayer) for part in parts] == [False, True, True]
    assert {row.weight for row in report(parts).patterns if row.adapter == "fr"} == {None, 1.0}
    with pytest.raises(ArgumentError, match="not in use with a weight of 1"):
        inject(parts, "2.0", r=1, adapter="fr")
    use(parts, "fr")
    assert [isinstance(part[0], LoRALayer) for part in parts] == [True, True, False]


def test_a_former_value_is_that_from_before_its_owner():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inject(model, "0", r=1, adapter="a", bias="all")
    use(model)
    inject(model, "1", r=1, adapter="k")
    use(model)
    remove(model, "a")
    with torch.no_grad():
        model[0].bias.fill_(7)
    inject(model, "0", r=1, adapter="c", bias="all")
    use(model)
    assert model[0].bias[0].item() == 7


def test_tensors_made_on_meta_are_filled_when_values_come(device):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    base = build()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for name in ("a", "b"):
        inject(model, "0", r=1, adapter=name, bias="all")
        use(model)
    model.to_empty(device=device)
    with pytest.raises(LoRAInjectError, match="reset_lora_parameters"):
        use(model, "a")
    model.load_state_dict(base.state_dict(), strict=False)
    reset_lora_parameters(model)
    for name in ("a", "b"):
        use(model, name)
        assert torch.equal(model[1].bias, base[1].bias)


@pytest.mark.parametrize("at", range(20))
def test_a_failing_swap_is_undone(at):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    inject(model, "0", r=1, bias="all")
    before = snapshot(model)
    with Faults(at, MemoryError) as faults:
        try:
            use(model)
        except MemoryError:
            assert changed_parts(before, snapshot(model)) == []
        else:
            assert not faults.raised
    use(model, "default")
    assert changed_parts(before, snapshot(model)) == []


def test_parametrized_after_inject_is_noticed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inject(model, "0", r=1, train_also="1")
    nn.utils.parametrizations.weight_norm(model[1])
    for call in (strip, use):
        with pytest.raises(LoRAInjectError, match=r"weight of a .*has no place any more"):
            call(model)


def test_swapping_inside_inference_mode_leaves_tensors_that_can_train():
    model = nn.Sequential(nn.Linear(3, 3))
    inject(model, "0", r=1, adapter="a", bias="all")
    with torch.inference_mode():
        use(model)
    inject(model, "0", r=1, adapter="c")
    use(model, "c")
    with torch.inference_mode():
        combine(model, {"c": 1.0}, "d")
    use(model, "d")
    assert model[0].lora_A_d.requires_grad


@pytest.mark.parametrize("bias", ["none", "all"])
def test_switching_keeps_gradients_and_freezing_drops_them(bias):
    """Adapters are trained in turns: forward and backward of each, then a step of each."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    optimizers = {}
    for name in ("a", "b"):
        inject(model, "0", r=2, adapter=name, bias=bias)
        optimizers[name] = torch.optim.SGD(lora_parameters(model), lr=0.1)
        use(model)
    randomize_adapters(model)
    apart = copy.deepcopy(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    for name in optimizers:
        use(model, name)
        model(x).square().sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    for name in optimizers:
        use(apart, name)
        apart(x).square().sum().backward()
        with torch.no_grad():
            for parameter in lora_parameters(apart):
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    for name in optimizers:
        use(model, name)
        use(apart, name)
        torch.testing.assert_close(model(x), apart(x), rtol=1e-12, atol=1e-12)
    freeze(model)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_gradient_that_a_switch_kept_goes_with_its_adapter():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inject(model, "0", r=1, adapter="a", bias="all")
    inject(model, "0", r=1, adapter="b")
    model(torch.randn(4, 3)).sum().backward()
    use(model, "b")  # keeps the gradients of a, for a step that comes later
    remove(model, "a")
    assert model[0].bias.grad is None
    strip(model)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("adapters", [["a"], ["a", "b"], []])
def test_switching_leaves_modes_as_somebody_has_set_them(adapters):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    inject(model, "0", r=1, adapter="a", train_also="1")
    inject(model, "0", r=1, adapter="b")
    model.eval()
    use(model, *adapters)
    assert not any(module.training for module in model.modules())
