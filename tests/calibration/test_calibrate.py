"""``calibrate``: exact moments and gradients in one pass, and a model that is what it was."""

import pytest
import torch
from every_kind import KINDS, make
from families import FAMILIES
from helpers import Net, changed_parts, ids, snapshot
from ranks import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectError,
    Statistics,
    UnsupportedLayerError,
    calibrate,
    inject,
    use,
)
from lora_inject.kinds import find_kind

pytestmark = pytest.mark.cpu("what is summed where does not depend on the device")
QKV = ["q_proj", "k_proj", "v_proj"]
WITH_ROWS = ["Linear", "Linear in parts", "Conv1D", "Conv2d", "ConvTranspose2d"]


def seen_inputs(model, layer, batches):
    """All that a layer reads, one vector under the other."""
    found = []
    handle = layer.register_forward_hook(lambda _, args, y: found.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found]).double()


def principal(x, k):
    """The first k principal directions, and their shares of the variance."""
    _, S, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return Vh[:k], S[:k].square() / S.square().sum()


def assert_same(one, other, **tolerances):
    assert one.layers == other.layers
    assert one.batches == other.batches
    assert list(one.inputs) == list(other.inputs)
    assert list(one.gradients) == list(other.gradients)
    for a, b in zip(one.inputs.values(), other.inputs.values(), strict=True):
        assert a.count == b.count
        torch.testing.assert_close(a.mean, b.mean, **tolerances)
        torch.testing.assert_close(a.scatter, b.scatter, **tolerances)
    for a, b in zip(one.gradients.values(), other.gradients.values(), strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def watched(model, batches, targets=None, **arguments):
    return calibrate(model, targets or [*QKV, "o_proj"], batches, progress=False, **arguments)


def squared(output, batch):
    return output.square().mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_directions_are_those_of_all_inputs_together(dtype):
    model, batches = Net().to(dtype).eval(), [ids(3, 5) for _ in range(6)]
    stats = watched(model, batches)
    for path in ("layers.0.q_proj", "layers.1.o_proj"):
        x = seen_inputs(model, model.get_submodule(path), batches)
        vectors, shares = principal(x, 3)
        moments = stats.inputs_of(path)
        assert moments.count == len(x)
        tolerance = 1e-9 if dtype is torch.float64 else 1e-4
        torch.testing.assert_close(moments.shares(3).double(), shares, rtol=tolerance, atol=1e-7)
        overlap = (moments.directions(3).double() * vectors).sum(-1).abs()
        torch.testing.assert_close(overlap, torch.ones(3).double(), rtol=tolerance, atol=1e-7)
        second = x.T @ x / len(x)
        torch.testing.assert_close(moments.second.double(), second, rtol=tolerance, atol=1e-6)


def test_inputs_far_from_zero_keep_their_variance_in_float32():
    model = nn.Sequential(nn.Linear(6, 2))
    scales = torch.tensor([5.0, 1.0, 0.5, 0.1, 0.1, 0.1])
    batches = [1e4 + scales * torch.randn(64, 6) for _ in range(8)]
    moments = watched(model, batches, "0").inputs_of("0")
    _, shares = principal(torch.cat(batches).double(), 3)
    torch.testing.assert_close(moments.shares(3).double(), shares, rtol=1e-3, atol=0)


def test_many_features_take_the_randomized_way():
    torch.manual_seed(0)
    model, basis = nn.Sequential(nn.Linear(2100, 2)), torch.randn(4, 2100)
    x = torch.randn(256, 4) @ basis + 0.01 * torch.randn(256, 2100)
    moments = watched(model, [x[:100], x[100:]], "0").inputs_of("0")
    vectors, shares = principal(x.double(), 3)
    torch.testing.assert_close(moments.shares(3).double(), shares, rtol=1e-3, atol=0)
    overlap = (moments.directions(3).double() * vectors).sum(-1).abs()
    torch.testing.assert_close(overlap, torch.ones(3).double(), rtol=1e-3, atol=0)


def test_the_order_of_batches_changes_nothing():
    model, batches = Net().double(), [ids(2, n) for n in (3, 7, 1, 5)]
    one = watched(model, batches, gradients=True, loss=squared)
    other = watched(model, batches[::-1], gradients=True, loss=squared)
    assert_same(one, other, rtol=1e-9, atol=1e-11)
    path = "layers.0.q_proj"
    torch.testing.assert_close(
        one.inputs_of(path).directions(3), other.inputs_of(path).directions(3)
    )


def test_layers_that_read_one_tensor_share_its_moments():
    stats = watched(Net(), [ids(), ids()])
    shared = tuple(f"layers.0.{name}" for name in QKV)
    assert shared in stats.inputs
    assert len({id(stats.inputs_of(path)) for path in shared}) == 1
    assert stats.inputs_of("layers.0.o_proj") is not stats.inputs_of("layers.0.q_proj")
    assert ("layers.0.o_proj",) in stats.groups


class Reads(nn.Module):
    """Three layers that read one tensor, or what was made of it."""

    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
        self.how, self.calls = how, 0

    def forward(self, x):
        x = x * 2
        self.calls += 1
        y = self.one(x)
        if self.how == "written into":
            x.mul_(3)
        if self.how == "views" or (self.how == "at times" and self.calls % 2):
            x = x.view(x.shape)
        y = y + self.two(x)
        return y if self.how == "one seldom" and self.calls > 1 else y + self.three(x)


@pytest.mark.parametrize(
    ("how", "groups"),
    [("one tensor", [("one", "two", "three")]),
     ("views", [("one", "two", "three")]),
     ("at times", [("one", "two", "three")]),
     ("written into", [("one",), ("two", "three")]),
     ("one seldom", [("one", "two"), ("three",)])],
)  # fmt: skip
@pytest.mark.parametrize("gradients", [False, True])
def test_equal_inputs_are_known_however_they_come(how, groups, gradients):
    batches = [torch.randn(5, 4) for _ in range(4)]
    more = {"gradients": True, "loss": squared} if gradients else {}
    if how == "written into" and gradients:
        pytest.skip("torch has no gradient of that either")
    stats = watched(Reads(how), batches, "all-linear", **more)
    assert stats.groups == groups
    x = 2 * torch.cat(batches)
    seldom = {"three": 2 * batches[0]} if how == "one seldom" else {}
    written = {"two": 3 * x, "three": 3 * x} if how == "written into" else {}
    for name in ("one", "two", "three"):
        expected = {"one": x, "two": x, "three": x, **seldom, **written}[name]
        moments = stats.inputs_of(name)
        assert moments.count == len(expected)
        torch.testing.assert_close(moments.mean, expected.mean(0))
        torch.testing.assert_close(moments.second, expected.T @ expected / len(expected))


def test_an_input_by_name_is_found():
    class Scaling(nn.Linear):
        def forward(self, vectors, scale=1.0):
            return super().forward(vectors) * scale

    model, x = nn.ModuleDict({"a": Scaling(4, 4)}), torch.randn(6, 4)
    model.forward = lambda x: model["a"](scale=2.0, vectors=x)
    torch.testing.assert_close(watched(model, [x], "a").inputs_of("a").mean, x.mean(0))
    with torch.no_grad():
        inject(model, "a", r=2)
    torch.testing.assert_close(watched(model, [x], "a").inputs_of("a").mean, x.mean(0))


def test_a_layer_that_is_called_twice_counts_both():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(6, 4)
    moments = watched(model, [x], "0").inputs_of("0")
    with torch.no_grad():
        both = torch.cat([x, torch.tanh(layer(x))])
    torch.testing.assert_close(moments.second, both.T @ both / 12)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.flat = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids, attention_mask=None, keep=None):
        x = self.proj(self.embed(ids))
        return self.flat(x.reshape(-1, 4))


@pytest.mark.parametrize("mask", [None, "keep", lambda batch: batch["keep"], False])
def test_what_a_mask_leaves_out_does_not_count(mask):
    model, tokens = Masked(), torch.randint(9, (3, 5))
    keep = torch.rand(3, 5) < 0.5
    keep[0, 0] = True
    name = "attention_mask" if mask is None else "keep"
    stats = watched(model, [{"ids": tokens, name: keep.long()}], ["proj", "flat"], mask=mask)
    x = model.embed(tokens).detach()
    for path, inputs in (("proj", x), ("flat", model.proj(x).detach())):
        expected = inputs.reshape(-1, 4) if mask is False else inputs[keep]
        assert stats.inputs_of(path).count == len(expected)
        torch.testing.assert_close(stats.inputs_of(path).mean, expected.mean(0))


def test_a_mask_that_does_not_fit_is_refused():
    model, batch = Masked(), {"ids": torch.ones(3, 5, dtype=torch.long)}
    short = {**batch, "attention_mask": torch.tensor([[1, 0]])}
    with pytest.raises(LoRAInjectError, match=r"^proj: its input has .*\(mask=False\)"):
        watched(model, [short], "proj")
    with pytest.raises(ArgumentError, match=r"^mask: 'kept' is no entry"):
        watched(model, [batch], "proj", mask="kept")
    assert watched(model, [short], "proj", mask=False).inputs_of("proj").count == 15


def test_a_mask_of_an_encoder_does_not_serve_a_decoder():
    family = FAMILIES["t5"]
    model, batch = family.build(), family.inputs()
    keep = torch.ones_like(batch["input_ids"])
    keep[0, -1] = 0
    with pytest.raises(ArgumentError, match=r"^mask: the model has an encoder and a decoder"):
        watched(model, [{**batch, "attention_mask": keep}], "SelfAttention.q")
    encoder = ["encoder.*.SelfAttention.q"]
    stats = watched(
        model, [{**batch, "attention_mask": keep}], encoder, mask="attention_mask"
    )  # fmt: skip
    assert {m.count for m in stats.inputs.values()} == {int(keep.sum())}


@pytest.mark.parametrize("kind", WITH_ROWS)
def test_rows_are_what_the_weight_multiplies(kind):
    layer, call, _ = make(kind, torch.float64)
    seen = []
    layer.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    call(layer)
    x, y = seen[0]
    known = find_kind(layer)
    shape = (-1, *(1,) * (y.dim() - 2)) if "Conv" in kind and kind != "Conv1D" else (-1,)
    product = known.output_rows(layer, y - layer.bias.reshape(shape))
    W = known.to_matrix(layer, layer.weight)
    torch.testing.assert_close(known.input_rows(layer, x, y) @ W.mT, product)


@pytest.mark.parametrize("kind", WITH_ROWS)
def test_gradients_are_those_of_the_weights(kind):
    layer, call, arguments = make(kind, torch.float64)
    batches = [call.__closure__ and KINDS[kind][3]().double() for _ in range(3)]
    parts = "parts" in arguments
    stats = watched(layer, batches, arguments["targets"], gradients=True, loss=squared)
    for x in batches:
        squared(layer(x), x).backward()
    expected = find_kind(layer).to_matrix(layer, layer.weight.grad) / 3
    torch.testing.assert_close(stats.gradient_of(""), expected)
    assert parts == (kind == "Linear in parts")


def test_gradients_pass_activations_in_place_and_checkpoints():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def block(self, x):
            return self.act(self.b(x))

        def forward(self, x):
            return checkpoint(self.block, self.act(self.a(x)), use_reentrant=False)

    model, x = Model().double(), torch.randn(6, 4).double()
    stats = watched(model, [x], ["a", "b"], gradients=True, loss=squared)
    assert stats.inputs_of("b").count == 6  # and not again when the block is computed again
    squared(model(x), x).backward()
    torch.testing.assert_close(stats.gradient_of("a"), model.a.weight.grad)
    torch.testing.assert_close(stats.gradient_of("b"), model.b.weight.grad)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_model_is_what_it_was(gradients):
    model = Net().train()
    model.layers[0].norm.eval()
    model.head.requires_grad_(False)
    model(ids()).sum().backward()
    before = snapshot(model)
    more = {"gradients": True, "loss": squared} if gradients else {}
    watched(model, [ids()], **more)
    assert changed_parts(before, snapshot(model)) == []

    class BrokenError(Exception):
        pass

    def broken(*_):
        raise BrokenError

    def batches():
        yield ids()
        raise BrokenError

    with pytest.raises(BrokenError):
        watched(model, batches(), **more)
    with pytest.raises(BrokenError):
        watched(model, [ids()], gradients=True, loss=broken)
    with pytest.raises(BrokenError):
        watched(model, [ids()], mask=broken)
    with pytest.raises(IndexError):
        watched(model, [ids(), ids() + 100], **more)
    assert changed_parts(before, snapshot(model)) == []


def test_adapters_in_use_count():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(5, 4)
    inject(model, "0", r=2)
    nn.init.normal_(model[0].lora_B)
    with_it = watched(model, [x], "1").inputs_of("1").mean
    torch.testing.assert_close(with_it, model[0](x).mean(0).detach())
    use(model)
    assert not torch.allclose(with_it, watched(model, [x], "1").inputs_of("1").mean)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("Embedding", "kind Embedding"), ("MultiheadAttention", "kind MultiheadAttention"),
     ("LSTM", "kind recurrent"), ("fused experts", "^up_proj: .* kind parameter")],
)  # fmt: skip
def test_what_multiplies_no_known_vectors_is_refused(kind, words):
    layer, _, arguments = make(kind)
    with pytest.raises(UnsupportedLayerError, match=words):
        watched(layer, [KINDS[kind][3]()], arguments["targets"])


class CentredConv(nn.Conv1d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class NormedLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize(
    "layer", [NormedLinear(4, 4), CentredConv(4, 4, 1)], ids=["linear", "conv"]
)
def test_a_forward_that_does_more_to_its_weight_is_refused(layer):
    with pytest.raises(UnsupportedLayerError, match=r"^a: the forward of .* makes other vectors"):
        watched(nn.ModuleDict({"a": layer}), [], "a")


def test_large_patches_are_refused():
    model = nn.Sequential(nn.Conv2d(600, 2, 3))
    with pytest.raises(UnsupportedLayerError, match=r"^0: its patches have 5,400 values"):
        watched(model, [torch.randn(1, 600, 3, 3)], "0")


def test_what_cannot_be_known_is_an_error():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.forward = lambda x: model["a"](x)
    x = torch.randn(3, 4)
    with pytest.raises(LoRAInjectError, match=r"^b: it was never called"):
        watched(model, [x], ["a", "b"])
    with pytest.raises(LoRAInjectError, match=r"^a: what it read .* not finite"):
        watched(model, [x / 0], "a")
    with pytest.raises(ArgumentError, match=r"^batches: there were none"):
        watched(model, [], "a")
    with pytest.raises(ArgumentError, match=r"^loss: the model returned no loss"):
        watched(model, [x], "a", gradients=True)
    with pytest.raises(ArgumentError, match=r"^loss: it does not depend"):
        watched(model, [x], "a", gradients=True, loss=lambda y, _: y.detach().sum())
    with pytest.raises(ArgumentError, match=r"^loss is for gradients=True"):
        watched(model, [x], "a", loss=squared)


def test_the_progress_bar_is_on_standard_error(capsys):
    calibrate(Net(), "q_proj", [ids(), ids()])
    shown = capsys.readouterr()
    assert shown.out == ""
    watched(Net(), [ids()])
    assert capsys.readouterr() == ("", "")


def test_saved_loaded_and_printed(tmp_path):
    stats = watched(Net(), [ids(), ids()], gradients=True, loss=squared)
    stats.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert_same(stats, again, rtol=0, atol=0)
    assert str(again) == str(stats)
    assert "layers.0.q_proj, layers.0.k_proj, layers.0.v_proj" in str(stats)


def test_a_file_that_is_not_whole_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from lora_inject.calibration.stored import KEY
    from lora_inject.files.formats.storage import read_tensors

    path = tmp_path / "s.safetensors"
    with pytest.raises(FormatError, match="there is no file"):
        Statistics.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="holds no statistics"):
        Statistics.load(path)
    watched(Net(), [ids()], gradients=True, loss=squared).save(path)
    told, tensors = read_tensors(path)[1], load_file(path)
    for name in tensors:
        save_file(
            {k: t for k, t in tensors.items() if k != name and "gradient" not in k}, path, told
        )
        if "gradient" not in name:
            with pytest.raises(FormatError, match="not whole"):
                Statistics.load(path)
        for wrong in (tensors[name] / 0, tensors[name].flatten()[1:].contiguous()):
            save_file({**tensors, name: wrong}, path, told)
            with pytest.raises(FormatError, match="not whole"):
                Statistics.load(path)
    for text in ("[]", "{}", '{"layers": {}, "inputs": [[3, "a"]], "batches": 1}', "{"):
        save_file(tensors, path, {KEY: text})
        with pytest.raises(FormatError):
            Statistics.load(path)


def rank_statistics(batches, how):
    torch.manual_seed(0)
    from torch import distributed as dist

    model = Reads(how).double() if how else Net().double()
    own = batches[dist.get_rank() :: 2]
    stats = watched(model, own, "all-linear" if how else None, gradients=True, loss=squared)
    return stats.all_reduce()


@pytest.mark.distributed
def test_two_ranks_know_what_one_would():
    batches = [ids(2, n) for n in (3, 7, 1, 5, 2)]
    torch.manual_seed(0)
    expected = watched(Net().double(), batches, gradients=True, loss=squared)
    for stats in on_ranks(2, rank_statistics, batches, ""):
        assert_same(stats, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.distributed
def test_ranks_that_saw_different_groups_add_up():
    batches = [torch.randn(n, 4).double() for n in (3, 7, 2)]  # the second has one alone
    for stats in on_ranks(2, rank_statistics, batches, "one seldom"):
        assert stats.groups == [("one", "two"), ("three",)]
        x = 2 * torch.cat(batches)
        torch.testing.assert_close(stats.inputs_of("one").second, x.T @ x / len(x))
        x = 2 * torch.cat([batches[0], batches[1]])  # the first call on each rank
        torch.testing.assert_close(stats.inputs_of("three").second, x.T @ x / len(x))


def test_without_ranks_there_is_nothing_to_add_up():
    with pytest.raises(LoRAInjectError, match="no process group"):
        watched(Net(), [ids()]).all_reduce()
