"""Convolutions: every geometry, against the weight W + s B A written out in float64."""

import pytest
import torch
from helpers import changed_parts, randomize_adapters, snapshot, train_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_inject import UnsupportedLayerError, inject, plan, strip

pytestmark = pytest.mark.usefixtures("device")

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def written_out(layer):
    """W + s B A of a convolution, from its definition, kernel by kernel."""
    A, B, groups = layer.lora_A, layer.lora_B, layer.groups
    scaling, r = layer.lora_adapters[0].settings.scaling, layer.lora_B.shape[1]
    W = layer._parameters["weight"].clone()
    transposed = isinstance(layer, tuple(TRANSPOSED.values()))
    out_of_group, in_of_group = layer.out_channels // groups, layer.in_channels // groups
    for o in range(layer.out_channels):
        group = o // out_of_group
        for i in range(in_of_group):
            for k in range(r):
                if transposed:
                    source = group * in_of_group + i
                    W[source, o % out_of_group] += scaling * B[o, k].squeeze() * A[source, k]
                else:
                    W[o, i] += scaling * B[o, k].squeeze() * A[group * r + k, i]
    return W


def check(layer, x, r=2, call=lambda m, x: m(x)):
    before, expected = snapshot(layer), call(layer, x)
    inject(layer, type(layer), r=r, alpha=3)
    assert torch.equal(call(layer, x), expected)
    randomize_adapters(layer, 0.5)
    output = call(layer, x)
    weight = written_out(layer)
    reference = torch.func.functional_call(
        type(layer).__mro__[3](*_arguments(layer)).double(),
        {"weight": weight, **({} if layer.bias is None else {"bias": layer.bias})},
        (x,) if call.__defaults__ is None else (x, *call.__defaults__),
    )
    torch.testing.assert_close(output, reference, rtol=1e-9, atol=1e-9)
    parameters = [layer.lora_A, layer.lora_B]
    direction = torch.randn_like(output)
    got = torch.autograd.grad((output * direction).sum(), parameters)
    want = torch.autograd.grad((reference * direction).sum(), parameters)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    strip(layer)
    assert changed_parts(before, snapshot(layer)) == []


def _arguments(layer):
    arguments = [layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride]
    if isinstance(layer, tuple(TRANSPOSED.values())):
        rest = [layer.padding, layer.output_padding, layer.groups, layer.bias is not None]
        return [*arguments, *rest, layer.dilation, layer.padding_mode]
    rest = [layer.padding, layer.dilation, layer.groups, layer.bias is not None]
    return [*arguments, *rest, layer.padding_mode]


@settings(max_examples=settings.default.max_examples * 4 // 5)
@given(data=st.data(), dims=st.integers(1, 3), transposed=st.booleans())
def test_any_geometry(data, dims, transposed):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups = draw(1, 3)
    n_in, n_out = groups * draw(1, 2), groups * draw(1, 2)
    options = {
        "kernel_size": draw(1, 3), "stride": draw(1, 2), "padding": draw(0, 2),
        "dilation": draw(1, 2), "groups": groups, "bias": data.draw(st.booleans()),
    }  # fmt: skip
    if transposed:
        largest = max(options["stride"], options["dilation"]) - 1
        options["output_padding"] = draw(0, largest)
    else:
        options["padding_mode"] = data.draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        )
    if dims == 3 and options.get("padding_mode") == "reflect":
        options["padding_mode"] = "zeros"
    layer = (TRANSPOSED if transposed else CONVOLUTIONS)[dims](n_in, n_out, **options).double()
    x = torch.randn(2, n_in, *(6,) * dims, dtype=torch.float64)
    check(layer, x, r=draw(1, 3))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(dims, padding):
    layer = CONVOLUTIONS[dims](2, 4, 3, padding=padding, dilation=2).double()
    check(layer, torch.randn(2, 2, *(7,) * dims).double())


def test_depthwise_and_unbatched():
    check(nn.Conv2d(6, 6, 3, groups=6, padding=1).double(), torch.randn(2, 6, 5, 5).double())
    check(nn.Conv1d(3, 4, 3).double(), torch.randn(3, 9).double())
    check(nn.ConvTranspose2d(3, 4, 3, stride=2).double(), torch.randn(3, 5, 5).double())


def test_the_output_size_of_a_transposed_convolution():
    def call(layer, x, size=(10, 11)):
        return layer(x, output_size=list(size))

    layer = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1).double()
    check(layer, torch.randn(2, 3, 5, 6).double(), call=call)


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_gradcheck(make):
    layer = make(2, 4, 2, groups=2, stride=2, dtype=torch.float64)
    inject(layer, make, r=1)
    randomize_adapters(layer, 0.5)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.ConvTranspose1d])
def test_step_zero_in_three_dtypes(make, dtype):
    layer, x = make(4, 6, 3, dtype=dtype), torch.randn(2, 4, 9).to(dtype)
    expected = layer(x)
    inject(layer, make, r=2)
    assert torch.equal(layer(x), expected)
    randomize_adapters(layer)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


class Standardized(nn.Conv2d):
    """Standardizes its weight, as weight-standardized ResNets do."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    """Pads by itself, as TensorFlow's "same" does."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize("make", [Standardized, Padded])
def test_a_subclass_with_its_own_forward_is_adapted_in_its_weight(make):
    layer, x = make(2, 4, 2).double(), torch.randn(2, 2, 5, 5).double()
    before, expected = snapshot(layer), layer(x)
    assert [site.way for site in plan(layer, make).sites] == ["weight"]
    inject(layer, make, r=2)
    assert torch.equal(layer(x), expected)
    randomize_adapters(layer, 0.5)
    reference = make(2, 4, 2).double()
    with torch.no_grad():
        reference.weight.copy_(written_out(layer))
        reference.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), reference(x))
    layer(x).sum().backward()
    strip(layer)
    assert changed_parts(before, snapshot(layer)) == []


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(h)))


class SmallResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layers = nn.Sequential(Bottleneck(8), Bottleneck(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


def test_a_residual_network_trains_and_comes_back():
    model, x = SmallResNet(), torch.randn(4, 3, 12, 12)
    expected = model(x)  # which moves the statistics
    before = snapshot(model)
    shown = inject(model, nn.Conv2d, r=2, train_also="fc")
    assert "4 normalisation layers stand" in shown.notes[0]
    assert torch.equal(model(x), expected)
    first = train_steps(model, x, steps=1)
    assert train_steps(model, x, steps=10) < first
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(5, 4, 3, stride=1, dilation=3, output_padding=2),
        nn.ConvTranspose2d(5, 4, 3, stride=2, dilation=3, output_padding=2),
    ],
)
def test_an_output_padding_as_large_as_the_stride(layer):
    x = torch.randn(2, 5, *(6,) * len(layer.kernel_size))
    expected = layer.to(x.device)(x)
    inject(layer, type(layer), r=2)
    assert torch.equal(layer(x), expected)


def test_convolutions_that_change_their_weight():
    class Masked(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight * torch.eye(weight.shape[-1]), bias)

    class Writing(nn.Conv2d):
        def forward(self, x):
            self.weight.data *= 0.5
            return super().forward(x)

    assert plan(Masked(2, 2, 3), nn.Conv2d, r=1).sites[0].way == "weight"
    with pytest.raises(UnsupportedLayerError, match="writes to its weight"):
        inject(nn.Sequential(Writing(2, 2, 3)), "0")
