"""Merge and exact unmerge: equal outputs, equal bits, and the class from before."""

import copy
import pickle

import pytest
import torch
from every_kind import KINDS, base_output, make
from families import FAMILIES
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot, train_steps
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lora_inject import (
    ArgumentError,
    LoRAInjectError,
    LoRALayer,
    UnsupportedLayerError,
    disabled,
    freeze,
    inject,
    merge,
    merged,
    plan,
    strip,
    unmerge,
    use,
)
from lora_inject.core.state import state_of
from lora_inject.own import own_tensor

pytestmark = pytest.mark.usefixtures("device")


def adapted(**arguments):
    model = Net()
    inject(model, ["q_proj", "v_proj", "embed"], r=2, **arguments)
    randomize_adapters(model)
    return model


def awake(model):
    return sum(isinstance(module, LoRALayer) for module in model.modules())


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_computes_the_same_merged(name):
    layer, call, arguments = make(name, torch.float64)
    original, expected = snapshot(layer), base_output(layer, call)
    inject(layer, **arguments)
    randomize_adapters(layer, 0.5)
    before, output = snapshot(layer), call(layer)
    shown = merge(layer)
    assert awake(layer) == 0
    assert type(layer) is type(KINDS[name][0]())
    torch.testing.assert_close(call(layer), output, rtol=1e-9, atol=1e-10)
    assert len(shown.weights) >= 1
    assert shown.worst == 0.0
    assert unmerge(layer) is layer
    assert changed_parts(before, snapshot(layer)) == []
    with disabled(layer):
        assert awake(layer) == 0
        torch.testing.assert_close(call(layer), expected, rtol=0, atol=0)
    assert changed_parts(before, snapshot(layer)) == []
    merge(layer)
    strip(layer)
    assert changed_parts(original, snapshot(layer)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_a_hundred_cycles_change_no_bit(dtype, keep):
    model = Net(dtype=dtype)
    inject(model, "all-linear", r=2)
    randomize_adapters(model)
    before = snapshot(model)
    for _ in range(100):
        merge(model, keep=keep)
        unmerge(model)
    assert changed_parts(before, snapshot(model)) == []


def test_the_sum_is_exact_and_rounded_once():
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    inject(layer, nn.Linear, r=4, alpha=6)
    randomize_adapters(layer, 0.01)
    exact = layer.weight.float() + 1.5 * (layer.lora_B @ layer.lora_A)
    update = exact - layer.weight.float()
    weight = layer.weight
    (shown,) = merge(layer).weights
    assert layer.weight is weight
    assert torch.equal(weight, exact.to(torch.bfloat16))
    lost = (weight.float() - exact).norm() / update.norm()
    assert shown.lost == pytest.approx(lost.item(), rel=1e-4)
    assert shown.lost > 0.1  # bfloat16 cannot hold so small an update
    assert "lost to rounding" in str(unmerge(layer) and merge(layer))
    assert " bfloat16 " in str(unmerge(layer) and merge(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_it_changes_no_bit(dtype, device):
    model = Net(dtype=dtype)
    inject(model, "all-linear", r=2, alpha=3)
    randomize_adapters(model)
    merge(model)
    expected = snapshot(model)
    unmerge(model)
    with torch.autocast(device.type):
        merge(model)
    assert changed_parts(expected, snapshot(model)) == []


@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 40), lambda: Conv1D(40, 24)])
@pytest.mark.parametrize("adapters", [1, 2])
def test_the_sum_of_float32_is_rounded_to_its_last_bits(make, adapters):
    layer = make()
    for name in "ab"[:adapters]:
        inject(layer, type(layer), r=4, alpha=6, adapter=name)
    use(layer, *"ab"[:adapters])
    randomize_adapters(layer, 0.5)
    exact = layer.weight.detach().double()
    for name in "ab"[:adapters]:
        A, B = (layer.get_parameter(f"lora_{of}_{name}").detach().double() for of in "AB")
        update = 1.5 * (B @ A)
        exact = exact + (update if exact.shape == (40, 24) else update.t())
    merge(layer)
    torch.testing.assert_close(layer.weight.double(), exact, rtol=0, atol=2e-6)
    assert layer.weight.is_contiguous()


def test_merged_families_compute_the_same():
    for name in ("llama", "gpt2", "t5", "mixtral"):
        family = FAMILIES[name]
        model, inputs = family.build().double().eval(), family.inputs()
        before = snapshot(model)
        inject(model, "all-linear", r=2)
        randomize_adapters(model, 0.3)
        output = model(**inputs)[0]
        with merged(model) as shown:
            assert len(shown.weights) == family.linears
            torch.testing.assert_close(model(**inputs)[0], output, rtol=1e-7, atol=1e-8)
        assert torch.equal(model(**inputs)[0], output)
        strip(model)
        assert changed_parts(before, snapshot(model)) == []


REFUSED = {
    "tied": "tied",
    "quantized": "quantized",
    "parametrized": "parametrized",
    "own forward": "Squared",
    "not finite": "not finite",
    "meta": "meta device",
}


class Squared(nn.Linear):
    """A forward of its own, which is that of a Linear until it is told to square."""

    squares = False

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y**2 if self.squares else y


def unmergeable(name):
    model = nn.ModuleDict({"good": nn.Linear(4, 4), "bad": nn.Linear(4, 4)})
    if name == "tied":
        model["other"] = nn.Linear(4, 4)
        model["other"].weight = model["bad"].weight
    elif name == "quantized":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(
            model, quantization.Int8WeightOnlyConfig(), lambda m, path: path == "bad"
        )
    elif name == "parametrized":
        parametrizations.weight_norm(model["bad"])
    elif name == "own forward":
        model["bad"] = Squared(4, 4)
    elif name == "meta":
        model["bad"].to("meta")
    inject(model, ["good", "bad"], r=1)
    model["bad"].squares = True
    with torch.no_grad():
        model["good"].lora_B.normal_()
        if name == "not finite":
            model["bad"].lora_B.fill_(float("inf"))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(name):
    model = unmergeable(name)
    weight, classes = model["good"].weight.clone(), [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedLayerError, match=REFUSED[name]) as caught:
        merge(model)
    assert "bad" in caught.value.path
    assert torch.equal(model["good"].weight, weight)
    assert [type(m) for m in model.modules()] == classes


def test_a_backward_pass_notices_a_merge_in_between():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, nn.Linear, r=1)
    randomize_adapters(model)
    loss = model(torch.randn(2, 4)).sum()
    merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_states_that_do_not_go_together():
    model = adapted()
    for keep in ("gpu", True, None):
        with pytest.raises(ArgumentError, match="keep"):
            merge(model, keep=keep)
    with pytest.raises(ArgumentError, match="keep"), merged(model, keep=False):
        pass
    with pytest.raises(LoRAInjectError, match="nothing in the model is merged"):
        unmerge(model)
    for call in (merge, lambda m: disabled(m).__enter__()):
        with pytest.raises(LoRAInjectError, match="no adapters"):
            call(Net())
    merge(model)
    for call in (merge, lambda m: plan(m, "k_proj"), lambda m: inject(m, "k_proj"), freeze):
        with pytest.raises(LoRAInjectError, match=r"merged now.*unmerge"):
            call(model)
    unmerge(model)
    with disabled(model):
        for call in (merge, lambda m: inject(m, "k_proj"), freeze, strip):
            with pytest.raises(LoRAInjectError, match="inside a disabled block"):
                call(model)
    assert awake(model) == 5


def test_keep_nothing():
    model = adapted()
    output, x = None, ids()
    output = model(x)
    merge(model, keep=False)
    for call in (unmerge, strip, lambda m: disabled(m).__enter__()):
        with pytest.raises(LoRAInjectError, match="keep=False"):
            call(model)
    strip(model, merge=True)
    torch.testing.assert_close(model(x), output)


@pytest.mark.parametrize("first", ["awake", "merged"])
def test_strip_with_merge_leaves_plain_layers_that_compute_the_same(first):
    model, x = Net(), ids()
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    keys = list(model.state_dict())
    inject(model, ["q_proj", "embed"], r=2, bias="all", train_also="head")
    train_steps(model, x)
    output = model.eval()(x)
    if first == "merged":
        merge(model)
    strip(model, merge=True)
    assert awake(model) == 0
    assert list(model.state_dict()) == keys
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    torch.testing.assert_close(model(x), output)


def test_strip_with_merge_changes_nothing_when_it_is_refused():
    model = adapted()
    nn.utils.parametrize.register_parametrization(model.layers[0].q_proj, "bias", nn.Identity())
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match="ParametrizedLoRALinear"):
        strip(model, merge=True)
    assert changed_parts(before, snapshot(model)) == []


def test_disabled_while_merged():
    model, x = adapted(bias="all"), ids()
    base = strip(copy.deepcopy(model)).requires_grad_(False)
    merge(model)
    before, output = snapshot(model), model(x)
    with disabled(model):
        assert torch.equal(model(x), base(x))
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(x), output)
    unmerge(model)
    assert awake(model) == 5


def test_a_compiled_model_notices():
    model, x = adapted().eval(), ids()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        outputs = [compiled(x)]
        with disabled(model):
            assert torch.equal(compiled(x), model(x))
            outputs.append(compiled(x))
        with merged(model):
            outputs.append(compiled(x))
        outputs.append(compiled(x))
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_merged_model(through):
    model, x = adapted(bias="all"), ids()
    merge(model)
    twin = through(model)
    assert torch.equal(twin(x), model(x))
    unmerge(twin)
    assert awake(twin) == 5
    assert awake(model) == 0
    strip(twin)
    strip(model)
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_train_and_eval_never_merge():
    model = adapted()
    before = snapshot(model)["state"]
    for mode in (True, False, True):
        model.train(mode)
        model.state_dict()
        assert awake(model) == 5
    assert snapshot(model)["state"] == before


@pytest.mark.parametrize("how", ["auto", "weight"])
def test_the_memory_format_stays(how, device):
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    model[1].weight = nn.Parameter(torch.randn(4, 4).t())
    inject(model, {"0": {"how": how}, "1": {}}, r=2)
    randomize_adapters(model)
    strides = [layer.weight.stride() for layer in model]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    merge(model)
    assert [own_tensor(layer, "weight").stride() for layer in model] == strides
    unmerge(model)
    assert [own_tensor(layer, "weight").stride() for layer in model] == strides


@pytest.mark.parametrize("mode", [True, False])
def test_stripping_with_merge_leaves_the_mode_alone(mode):
    model = Net().train(not mode)
    inject(model, ["q_proj"], r=2, bias="all", train_also=["head"])
    model.train(mode)
    strip(model, merge=True)
    assert all(module.training is mode for module in model.modules())


def test_one_more_merge_rounds_once_too():
    def model():
        torch.manual_seed(0)
        net = Net(dtype=torch.bfloat16)
        for name in "ab":
            inject(net, "q_proj", r=2, adapter=name, seed=1)
        use(net, "a", "b")
        torch.manual_seed(0)
        randomize_adapters(net)
        return net

    at_once, after = model(), model()
    merge(at_once)
    merge(after, "a")
    merge(after, "b")
    weights = [net.layers[0].q_proj.weight for net in (at_once, after)]
    assert torch.equal(*weights)


def test_a_dora_of_another_weight_of_the_module_may_stay():
    module = nn.Module()
    module.up, module.down = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    inject(module, "up", r=2, adapter="a")
    inject(module, "down", r=2, adapter="b", variant="dora")
    use(module, "a", "b")
    randomize_adapters(module)
    up, down = module.up + 0, module.down + 0
    merge(module, "a")
    torch.testing.assert_close(module.up + 0, up)
    assert torch.equal(module.down + 0, down)
    assert torch.equal(module._parameters["up"], module.up + 0)


def test_adapters_are_merged_one_after_another_where_nothing_is_kept():
    model, x = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(3, 4).double()
    base = model[0].weight.detach().clone()
    for name in ("a", "b"):
        inject(model, "0", r=2, adapter=name)
    use(model, "a", "b")
    randomize_adapters(model, names=["a", "b"])
    updates = [B @ A for A, B in (("lora_A_a", "lora_B_a"), ("lora_A_b", "lora_B_b"))
               for A, B in [(model[0].get_parameter(A), model[0].get_parameter(B))]]  # fmt: skip
    expected = model(x)
    for name, update in zip("ab", updates, strict=True):
        merge(model, name, keep=False)
        base = base + update.detach()
        torch.testing.assert_close(model[0].weight.detach(), base)
        torch.testing.assert_close(model(x), expected)
    with pytest.raises(LoRAInjectError, match="merged with keep=False"):
        unmerge(model)


def test_without_adapters_in_use_there_is_nothing_to_merge():
    model = adapted()
    use(model)
    with pytest.raises(LoRAInjectError, match="no adapters in use to merge"):
        merge(model)


def test_a_block_ends_what_it_has_merged_and_is_merged_still():
    model = nn.Sequential(nn.Linear(4, 4))
    for name in "ab":
        inject(model, "0", r=2, adapter=name)
    use(model, "a", "b")
    randomize_adapters(model, names="ab")
    before, x = snapshot(model), torch.randn(2, 4)
    output = model(x)
    with merged(model, "a"):
        merge(model, "b")
    assert state_of(model[0]).merged.adapters == {"b"}
    torch.testing.assert_close(model(x), output)
    with disabled(model), pytest.raises(LoRAInjectError, match="inside a disabled block"):
        unmerge(model)
    unmerge(model)
    with merged(model):
        unmerge(model)
    assert changed_parts(before, snapshot(model)) == []
    with merged(model):
        strip(model)
    assert awake(model) == 0


def test_a_weight_whose_sum_alone_is_not_finite_is_merged():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(3e38)
    inject(layer, nn.Linear, r=1)
    assert [lost for _, _, lost in merge(layer).weights] == [0.0]
    assert layer.weight.isfinite().all()


def test_adapters_of_16_bits_are_added_up_in_32():
    layer = nn.Linear(8, 8)
    for name in "ab":
        inject(layer, nn.Linear, r=2, adapter=name, dtype=torch.bfloat16)
    use(layer, "a", "b")
    randomize_adapters(layer, 0.5, names="ab")
    exact = layer.weight.detach().clone()
    for name in "ab":
        A, B = (layer.get_parameter(f"lora_{of}_{name}").detach().float() for of in "AB")
        exact += B @ A
    merge(layer)
    torch.testing.assert_close(layer.weight.detach(), exact, rtol=0, atol=1e-6)


def test_merging_leaves_parts_alone_that_do_not_use_the_adapter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, nn.Linear, r=2, adapter="a")
    inject(model, nn.Linear, r=2, adapter="b")
    randomize_adapters(model)
    use(model[0], "a")
    use(model[1], "b")
    x = torch.randn(3, 4)
    expected = model(x)
    merge(model, "a")
    assert (state_of(model[0]).merged.adapters, state_of(model[1]).merged) == ({"a"}, None)
    assert torch.allclose(model(x), expected, atol=1e-6)
    unmerge(model)
    merge(model)
    assert [state_of(layer).merged.adapters for layer in model] == [{"a"}, {"b"}]


def test_a_model_whose_layers_were_replaced_is_told_which():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, "0", r=2)
    model[0] = nn.Linear(4, 4)
    with pytest.raises(LoRAInjectError, match="no adapters any more: 0 "):
        merge(model)


def test_each_weight_of_a_layer_gets_what_is_its_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.V = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x):
            return x @ self.W.T @ self.V.T

    model = nn.ModuleDict({"two": Two()})
    inject(model, "two.W", r=2, alpha=1, adapter="a")
    inject(model, "two.V", r=2, alpha=8, adapter="b")
    randomize_adapters(model)
    use(model, "a", "b")
    x = torch.randn(5, 4)
    expected = model["two"](x)
    merge(model)
    assert torch.allclose(model["two"](x), expected, atol=1e-5)


def test_a_change_of_the_former_weight_that_is_merged_already_is_in_nobodys_way():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", r=2, adapter="a", variant="dora")
    inject(model, "0", r=2, adapter="b")
    randomize_adapters(model)
    use(model, "a", "b")
    x = torch.randn(3, 4)
    expected = model(x)
    merge(model, "a")
    merge(model, "b")
    assert torch.allclose(model(x), expected, atol=1e-6)
