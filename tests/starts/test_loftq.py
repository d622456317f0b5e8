"""LoftQ: A and B begin as the best of what quantizing has lost, whatever the scaling."""

import copy
import pickle

import pytest
import torch
from helpers import changed_parts, snapshot
from safetensors.torch import save_file
from torch import nn

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectError,
    UnsupportedLayerError,
    inject,
    reset_lora_parameters,
    strip,
)
from lora_inject.starts import LoftQ

pytestmark = pytest.mark.usefixtures("device")
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], device="cpu")  # fmt: skip


def nf4(W):
    """The codes of a weight, and the largest value of each block of 64 (Dettmers et al. 2023)."""
    blocks = W.detach().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = (blocks / largest).unsqueeze(-1).sub(NF4.to(W.device)).abs().argmin(-1)
    return codes.to(torch.uint8), largest


class NF4Linear(nn.Module):
    """A packed Linear that only its forward can read, and that remembers its first input."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, largest = nf4(linear.weight)
        self.register_buffer("weight_packed", codes)
        self.register_buffer("scales", largest)
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.first = None

    @property
    def values(self):
        shape = (self.out_features, self.in_features)
        return (NF4.to(self.scales.device)[self.weight_packed.long()] * self.scales).reshape(shape)

    def forward(self, x):
        self.first = self.first or x.dtype
        return nn.functional.linear(x, self.values, self.bias)


def models():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 96))
    packed = nn.Sequential(NF4Linear(original[0]), nn.Tanh(), NF4Linear(original[2]))
    return original, packed


def lost(original, packed, path, scaling):
    layer, W = packed.get_submodule(path), original.get_submodule(path).weight
    left = W - layer.values - scaling * layer.lora_B @ layer.lora_A
    return float((left.norm() / W.norm()).detach())


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("alpha", [1, 8, 16, 64])
def test_the_error_falls_for_every_alpha_and_below_pefts(alpha, scaling):
    original, packed = models()
    start = LoftQ(original)
    inject(packed, ["0", "2"], r=8, alpha=alpha, scaling=scaling, init=start)
    s = alpha / (8 if scaling == "lora" else 8**0.5)
    for path in ("0", "2"):
        D = original.get_submodule(path).weight.detach() - packed.get_submodule(path).values
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        size = float(original.get_submodule(path).weight.detach().norm())
        best = float(S[8:].norm()) / size
        theirs = float((D - s * (U[:, :8] * S[:8]) @ Vh[:8]).norm()) / size  # PEFT forgets s
        ours = lost(original, packed, path, s)
        assert ours == pytest.approx(best, rel=1e-4)
        assert ours < 0.93 * float(D.norm()) / size
        assert ours <= theirs * (1 + 1e-4)
        if alpha == 16:
            assert ours < 0.93 * theirs
        assert start.errors[path] == pytest.approx((float(D.norm()) / size, ours), rel=1e-4)
    assert "LoftQ: what is lost" in str(start)
    assert f"{start.errors['2'][1]:.4f}" in str(start)


def test_outputs_move_towards_the_original_and_back():
    original, packed = models()
    x = torch.randn(5, 128)
    before, quantized = snapshot(packed), packed(x)
    packed[0].first = packed[2].first = None
    shown = inject(packed, ["0", "2"], r=16, init=LoftQ(original))
    assert packed[0].first is None  # making the start was no call of the layer
    assert any("moves outputs" in note for note in shown.notes)
    error = (packed(x) - original(x)).norm()
    assert error < (quantized - original(x)).norm()
    packed[0].first = packed[2].first = torch.float32
    strip(packed)
    assert torch.equal(packed(x), quantized)
    assert [part for part in changed_parts(before, snapshot(packed)) if part != "attributes"] == []


def test_the_original_is_a_file_a_directory_a_state_dict_or_a_module(tmp_path):
    original, packed = models()
    state = original.state_dict()
    save_file(state, tmp_path / "one.safetensors")
    several = tmp_path / "several"
    several.mkdir()
    for i, (name, tensor) in enumerate(state.items()):
        save_file({name: tensor}, several / f"{i}.safetensors")
    indexed = tmp_path / "indexed"
    indexed.mkdir()
    save_file(state, indexed / "model.safetensors")
    save_file({"0.weight": torch.zeros(64, 128)}, indexed / "other.safetensors")
    names = ", ".join(f'"{name}": "model.safetensors"' for name in state)
    (indexed / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{names}}}}}')
    found = []
    for source in (tmp_path / "one.safetensors", str(several), indexed, state, original):
        twin = copy.deepcopy(packed)
        inject(twin, ["0", "2"], r=4, init=LoftQ(source), seed=0)
        found.append(twin[0].lora_B @ twin[0].lora_A)
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_parts_of_a_packed_weight_with_a_bias_in_a_buffer(init):
    original, packed = models()
    bias = packed[0]._parameters.pop("bias")
    packed[0].register_buffer("bias", bias.detach())
    parts = {"0": (("q", 16), (None, 24), ("v", 24))}
    start = LoftQ(original) if init == "loftq" else init
    inject(packed, "0", r=4, alpha=8, init=start, parts=parts)
    Q = packed[0].values
    W = original[0].weight.detach() - Q if init == "loftq" else Q
    for part, rows in (("q", slice(0, 16)), ("v", slice(40, 64))):
        U, S, Vh = torch.linalg.svd(W[rows], full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        A, B = (getattr(packed[0], f"{part}_lora_{role}") for role in "AB")
        torch.testing.assert_close(2 * B @ A, best, rtol=1e-4, atol=1e-5)


def test_a_plain_base_that_was_rounded_gets_it_too():
    original = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(4, 6))
    coarse = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in coarse.parameters():
            parameter.mul_(16).round_().div_(16)
    for path in ("0", "1"):
        start = LoftQ(original)
        inject(coarse, path, r=2, alpha=5, init=start)
        before, after = start.errors[path]
        assert 0 < after < before
        strip(coarse)


def test_where_nothing_was_lost_the_adapter_can_learn():
    original, _ = models()
    model, x = copy.deepcopy(original), torch.randn(5, 128)
    expected = copy.deepcopy(original).requires_grad_(False)(x)
    inject(model, "0", r=4, init=LoftQ(original))
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model[0].lora_A.any()
    assert model[0].lora_B.grad.any()


def test_a_pickle_keeps_a_path_and_no_weights(tmp_path):
    original, packed = models()
    save_file(original.state_dict(), tmp_path / "one.safetensors")
    inject(packed, "0", r=4, init=LoftQ(tmp_path / "one.safetensors"))
    A = packed[0].lora_A.clone()
    twin = pickle.loads(pickle.dumps(packed))
    nn.init.zeros_(twin[0].lora_A)
    reset_lora_parameters(twin)
    assert torch.equal(twin[0].lora_A, A)
    strip(packed)
    inject(packed, "0", r=4, init=LoftQ(original))
    assert len(pickle.dumps(packed)) < 100_000
    with pytest.raises(LoRAInjectError, match=r"^0: .* original is not there"):
        reset_lora_parameters(pickle.loads(pickle.dumps(packed)))


def test_what_does_not_fit_is_refused(tmp_path):
    original, packed = models()
    before = snapshot(packed)
    with pytest.raises(UnsupportedLayerError, match=r"^0: .*Give init=LoftQ\(original\)"):
        inject(packed, "0", init="loftq")
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* original has no 0.weight"):
        inject(packed, "0", init=LoftQ({"a.weight": torch.zeros(2)}))
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* has the shape \(2, 2\)"):
        inject(packed, "0", init=LoftQ({"0.weight": torch.zeros(2, 2)}))
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* is quantized itself"):
        inject(packed, "0", init=LoftQ({"0.weight": torch.zeros(64, 128, dtype=torch.uint8)}))
    save_file({"0.weight": torch.zeros(64, 128, dtype=torch.int8)}, tmp_path / "b.safetensors")
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* is quantized itself"):
        inject(packed, "0", init=LoftQ(tmp_path / "b.safetensors"))
    (tmp_path / "b.safetensors").unlink()
    conv = nn.Sequential(nn.Conv2d(4, 6, 3))
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* has the shape \(6, 4, 2, 2\)"):
        inject(conv, "0", init=LoftQ({"0.weight": torch.zeros(6, 4, 2, 2)}))
    with pytest.raises(UnsupportedLayerError, match=r"^0: .* fewer than r=65"):
        inject(packed, "0", r=65, init=LoftQ(original))
    with pytest.raises(ArgumentError, match=r"^original must be"):
        LoftQ(3)
    with pytest.raises(FormatError, match="no safetensors files"):
        LoftQ(tmp_path)
    (tmp_path / "a.safetensors").write_text("no")
    with pytest.raises(FormatError, match="no whole safetensors"):
        LoftQ(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FormatError, match="no index"):
        LoftQ(tmp_path)
    assert changed_parts(before, snapshot(packed)) == []


def test_bitsandbytes_too(device):
    bnb = pytest.importorskip("bitsandbytes")
    original, _ = models()
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4")
    layer.load_state_dict(original[0].state_dict())
    model = nn.Sequential(layer).to(device)
    before = dict(vars(layer))
    start = LoftQ(original)
    inject(model, "0", r=8, alpha=16, init=start)
    strip(model)
    changed = [name for name, value in vars(layer).items() if value is not before.get(name)]
    assert [name for name in changed if name not in ("_lora_inject_state",)] == []
    quantized, ours = start.errors["0"]
    assert ours < 0.93 * quantized
