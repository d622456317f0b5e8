"""Saving, loading in place and resuming: values, ties, what is replaced, and what is refused."""

import copy
import json

import pytest
import torch
import transformers as tf
from families import DECODER
from helpers import (
    Net,
    ids,
    randomize_adapters,
    snapshot,
    train_steps,
)
from stored_models import SAFE, Nested, Tied, bare, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectError,
    LoRALayer,
    inject,
    load,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    save,
    strip,
    use,
)
from lora_inject.files.formats.storage import read_tensors

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_loading_fills_an_adapter_in_place(bias, tmp_path):
    model, x = trained(bias, train_also="head"), ids()
    save(model, tmp_path)
    twin = trained(bias, seed=0, train_also="head")
    optimizer = torch.optim.Adam(lora_parameters(twin))
    parameters = {id(p) for p in twin.parameters()}
    train_steps(twin, x, steps=2)
    assert not torch.equal(twin(x), model(x))
    load(twin, tmp_path)
    assert torch.equal(twin(x), model(x))
    assert {id(p) for p in twin.parameters()} == parameters
    twin(x).sum().backward()
    optimizer.step()
    assert not torch.equal(twin(x), model(x))


def test_a_smaller_rank_and_another_scaling_fill_the_same_tensors(tmp_path):
    """What a hot swap needs: shapes and scaling of the model stay, values change."""
    for kind, x in (
        (lambda: nn.Linear(4, 6), torch.randn(3, 4)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 7, 7)),
        (lambda: nn.Embedding(9, 4), torch.arange(9)),
    ):
        torch.manual_seed(0)
        base = Nested(kind())
        small, large = copy.deepcopy(base), copy.deepcopy(base)
        inject(small, "a.b", r=2, alpha=3)
        randomize_adapters(small)
        save(small, tmp_path)
        inject(large, "a.b", r=4, alpha=4)
        randomize_adapters(large)
        load(large, tmp_path)
        torch.testing.assert_close(large(x), small(x))
        save(large, tmp_path / "large")
        with pytest.raises(FormatError, match="of another shape"):
            load(small, tmp_path / "large")


def test_hot_swaps_recompile_nothing(tmp_path):
    torch.manual_seed(0)
    base, x = Nested(nn.Linear(4, 6)), torch.randn(3, 4)
    outputs = []
    for i in range(3):
        model = copy.deepcopy(base)
        inject(model, "a.b", r=i + 1, alpha=i + 2)
        randomize_adapters(model)
        save(model, tmp_path / str(i))
        outputs.append(model(x))
    model = copy.deepcopy(base)
    inject(model, "a.b", r=4)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x)
    for i in (0, 1, 2, 1, 0):
        load(model, tmp_path / str(i))
        torch.testing.assert_close(compiled(x), outputs[i])
    assert len(graphs) == 1


def test_a_second_adapter_waits_until_it_is_used(tmp_path):
    first, second, x = trained("all", seed=1), trained("all", seed=2), ids()
    for name, model in (("first", first), ("second", second)):
        model.load_state_dict({**model.state_dict(), **{
            k: v for k, v in bare().state_dict().items() if not k.endswith("bias")}})  # fmt: skip
        save(model, tmp_path / name)
    model = bare()
    outputs = {(): model(x)}
    for name in ("first", "second"):
        load(model, tmp_path / name, adapter=name, other_base=True)
        assert torch.equal(model(x), outputs.setdefault(("first",), model(x)))
    assert {n.rsplit("_", 1)[1] for n, p in model.named_parameters()
            if p.requires_grad and "lora" in n} == {"first"}  # fmt: skip
    use(model, "second")
    outputs["second",] = model(x)
    for name, source in (("first", first), ("second", second)):
        torch.testing.assert_close(outputs[name,], source(x))
    use(model)
    assert torch.equal(model(x), outputs[()])
    before = snapshot(bare())["state"]
    strip(model)
    assert snapshot(model)["state"] == before


def test_a_base_checkpoint_loads_into_an_injected_model():
    base = bare()
    model = trained("none")
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert {key.rsplit(".", 1)[1] for key in result.missing_keys} == {"lora_A", "lora_B"}
    strip(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    model.load_state_dict(base.state_dict())


@pytest.mark.parametrize("way", ["state_dict", "files"])
def test_resuming_gives_the_same_next_step(way, tmp_path):
    def build():
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))
        return model

    def step(model, optimizer, i):
        torch.manual_seed(100 + i)
        tokens = torch.randint(3, 60, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    settings = {"targets": "all-linear", "r": 2, "dropout": 0.1, "bias": "all",
                "train_also": "lm_head"}  # fmt: skip
    model = build()
    inject(model, **settings)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for i in range(3):
        step(model, optimizer, i)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    if way == "files":
        save(model, tmp_path / "adapter")
    else:
        torch.save(model.state_dict(), tmp_path / "model.pt")
    step(model, optimizer, 3)

    again = build()
    inject(again, **settings)
    if way == "files":
        load(again, tmp_path / "adapter")
    else:
        again.load_state_dict(torch.load(tmp_path / "model.pt"))
    other = torch.optim.AdamW(lora_parameters(again), lr=1e-2)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    step(again, other, 3)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_saving_keeps_other_files_and_replaces_its_own_together(tmp_path, monkeypatch):
    model, x = trained(), ids()
    (tmp_path / "README.md").write_text("mine")
    save(model, tmp_path)
    expected = model(x)
    train_steps(model, x)
    calls = []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return replace(source, target)

    import os

    replace = os.replace
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(FormatError, match=r"cannot be written to: no space left on device"):
        save(model, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", SAFE,
    ]  # fmt: skip
    assert torch.equal(load(bare(), tmp_path)(x), expected)
    save(model, tmp_path)
    assert torch.equal(load(bare(), tmp_path)(x), model(x))
    assert sorted(p.name for p in tmp_path.iterdir())[0] == "README.md"


def test_files_of_two_saves_are_noticed(tmp_path):
    save(trained(), tmp_path)
    config = tmp_path / "adapter_config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "base_model_name_or_path": "renamed"}))
    load(bare(), tmp_path)  # an edit that changes nothing of what the tensors mean
    config.write_text(json.dumps({**text, "lora_alpha": 30}))
    with pytest.raises(FormatError, match="not of one save"):
        load(bare(), tmp_path)


def test_the_meta_device_can_hold_nothing(tmp_path):
    save(trained(), tmp_path)
    with torch.device("meta"):
        model = Net()
    with pytest.raises(FormatError, match=r"layers.0.q_proj: it is on the meta device.*to_empty"):
        load(model, tmp_path)
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    inject(model, "q_proj", r=2)
    with pytest.raises(LoRAInjectError, match="on the meta device"):
        save(model, tmp_path)


def test_arguments():
    model = trained()
    with pytest.raises(ArgumentError, match="format must be one of"):
        save(model, "x", format="zip")
    with pytest.raises(ArgumentError, match="format must be one of"):
        load(model, "x", format="zip")
    with pytest.raises(FormatError, match="no file or directory"):
        load(model, "/nowhere/at/all")
    with pytest.raises(ArgumentError, match="letters, digits"):
        load(model, "x", adapter="a b")


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("place", ["emb", "head"])
def test_tied_adapters_come_back(place, portable, tmp_path):
    base, tokens = Tied(), torch.arange(9)
    model = copy.deepcopy(base)
    inject(model, place, r=2, alpha=3)
    randomize_adapters(model)
    expected = model(tokens)
    save(model, tmp_path, portable=portable)
    torch.testing.assert_close(load(copy.deepcopy(base), tmp_path)(tokens), expected)
    torch.testing.assert_close(load(model, tmp_path)(tokens), expected)
    state = lora_state_dict(model)
    assert {key.split(".")[0] for key in state} == {"emb", "head"}
    load_lora_state_dict(model, state)
    follower = next(key for key in state if not key.startswith(place))
    with pytest.raises(FormatError, match="tied in this model"):
        load_lora_state_dict(model, {**state, follower: state[follower] + 1})


def test_values_too_large_for_the_model_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", r=2)
    with torch.no_grad():
        model[0].lora_B.fill_(1e6)
    save(model, tmp_path)
    base = strip(copy.deepcopy(model))
    with pytest.raises(FormatError, match="not finite"):
        load(copy.deepcopy(base), tmp_path, dtype=torch.float16)
    small = copy.deepcopy(base)
    inject(small, "0", r=2, dtype=torch.float16)
    with pytest.raises(FormatError, match="too large"):
        load(small, tmp_path)


@pytest.mark.parametrize("alpha", [1e-7, 1e6, 7.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_portable_files_of_16_bits_lose_nothing(alpha, dtype, tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    base = copy.deepcopy(model)
    inject(model, "0", r=3, alpha=alpha, dtype=dtype)
    randomize_adapters(model)
    save(model, tmp_path, portable=True)
    loaded = load(base, tmp_path, dtype=torch.float32)
    model.float()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def test_train_also_is_read_by_the_whole_path(tmp_path):
    base = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])])
    model = copy.deepcopy(base)
    inject(model, "1.1", r=1, train_also=lambda path, _: path == "0")
    with pytest.raises(FormatError, match=r"PEFT would take 1\.0 for one"):
        save(model, tmp_path)
    head = nn.ModuleDict({"q": nn.Linear(2, 2), "h": nn.ModuleList([nn.Linear(2, 2)])})
    other = copy.deepcopy(head)
    inject(other, "q", r=1, train_also=["h", "h.0"])
    save(other, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["h"]
    assert load(head, tmp_path)["h"][0].weight.requires_grad


def test_router_weights_and_shared_layers(tmp_path):
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x @ self.weight.T

    base, x = Nested(Router()), torch.randn(2, 4)
    model = copy.deepcopy(base)
    inject(model, "a.b.weight", r=2)
    randomize_adapters(model)
    save(model, tmp_path)
    torch.testing.assert_close(load(base, tmp_path)(x), model(x))
    shared = nn.ModuleDict({"one": nn.Linear(2, 2)})
    shared["two"] = shared["one"]
    inject(shared, "one", r=1)
    with pytest.raises(FormatError, match="one stands at several paths"):
        save(shared, tmp_path)
    root = nn.Linear(2, 2)
    inject(root, nn.Linear, r=1)
    with pytest.raises(FormatError, match="the model itself is nothing that PEFT can adapt"):
        save(root, tmp_path)


def test_quantized_bases(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")

    model = nn.Sequential(nn.Linear(64, 64))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    inject(model, "0", r=2)
    randomize_adapters(model)
    save(model, tmp_path)
    x = torch.randn(2, 64)
    expected = model(x)
    assert torch.equal(load(strip(model), tmp_path)(x), expected)


@pytest.mark.parametrize("path", [3, None, 1.5])
def test_paths_that_are_none(path, tmp_path):
    model = trained()
    for call in (save, load):
        with pytest.raises(ArgumentError, match="path must be a path"):
            call(model, path)
    with pytest.raises(FormatError, match="no file or directory"):
        load(model, tmp_path / ("x" * 300))
    with pytest.raises(LoRAInjectError):
        save(model, "a\0b")
    with pytest.raises(ArgumentError, match="format must be one of"):
        save(model, tmp_path, format=["peft"])


def test_an_averaged_model_writes_the_keys_of_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, "0", r=2)
    randomize_adapters(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert list(lora_state_dict(average)) == list(lora_state_dict(model))
    for name, one in (("model", model), ("average", average)):
        save(one, tmp_path / f"{name}.safetensors", format="kohya")
    # Not their bytes: safetensors writes metadata in any order.
    files = [tmp_path / f"{name}.safetensors" for name in ("model", "average")]
    first, second = map(read_tensors, files)
    assert first[1] == second[1]
    assert list(first[0]) == list(second[0])
    assert all(torch.equal(tensor, second[0][key]) for key, tensor in first[0].items())


class Spectral(nn.Module):
    """A spectral convolution of a neural operator: its weight is complex."""

    def __init__(self, dtype=torch.cfloat):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, dtype=dtype))

    def forward(self, x):
        weight = self.weight.to(torch.cfloat)
        return torch.fft.irfft(torch.einsum("bim,iom->bom", torch.fft.rfft(x)[..., :3], weight), 8)


def operator(dtype=torch.cfloat, **options):
    torch.manual_seed(0)
    model = nn.Sequential(Spectral(dtype), nn.Linear(8, 8))
    if options:
        inject(model, nn.Linear, r=2, seed=0, **options)
    return model


@pytest.mark.parametrize("format", ["peft", "loralib", "diffusers"])
def test_complex_tensors_that_were_trained_are_saved(format, tmp_path):
    model, x = operator(train_also=["0"]), torch.randn(2, 4, 8)
    model(x).square().mean().backward()
    torch.optim.SGD(lora_parameters(model), 0.1).step()
    y, file = model(x), tmp_path / ("a.pt" if format == "loralib" else "a")
    save(model, file, format=format)
    new, twin, third = operator(), operator(train_also=["0"]), operator(train_also=["0"])
    load(new, file, alpha=2)
    load(twin, file, alpha=2)
    load_lora_state_dict(third, lora_state_dict(model))
    assert all(torch.equal(other(x), y) for other in (new, twin, third))
    assert torch.equal(strip(new)[0].weight, operator()[0].weight)


def test_complex_values_fill_complex_places_alone(tmp_path):
    model, real = operator(train_also=["0"]), operator(torch.float32, train_also=["0"])
    state = lora_state_dict(model)
    with pytest.raises(FormatError, match=r"no plain tensors \(0.weight"):
        load_lora_state_dict(real, state)
    with pytest.raises(FormatError, match=r"1 not finite \(0.weight\)"):
        load_lora_state_dict(model, {**state, "0.weight": state["0.weight"] * float("nan")})
    save(model, tmp_path)
    with pytest.raises(FormatError, match=r"complex64 in the file and torch.float32 in"):
        load(operator(torch.float32), tmp_path, other_base=True)


@pytest.mark.parametrize("way", ["new", "filled", "state"])
def test_adapters_that_are_loaded_in_inference_mode_can_train(way, tmp_path):
    """An evaluation swaps adapters in, and training goes on with them."""
    model, x = trained("all", train_also="head"), ids()
    save(model, tmp_path)
    other = bare()
    if way != "new":
        inject(other, ["q_proj", "v_proj"], r=2, alpha=3, bias="all", train_also="head")
    with torch.inference_mode():
        if way == "state":
            load_lora_state_dict(other, {k: v.clone() for k, v in lora_state_dict(model).items()})
        else:
            load(other, tmp_path)
    assert torch.equal(other(x), model(x))
    train_steps(other, x, steps=2)
    assert not torch.equal(other(x), model(x))
    strip(other)
    assert torch.equal(other(x), bare()(x))


@pytest.mark.parametrize("filled", [False, True])
def test_an_adapter_that_is_loaded_to_be_used_alone_does_not_train(filled, tmp_path):
    model, x = trained("all", train_also="head"), ids()
    save(model, tmp_path)
    other = bare()
    if filled:
        inject(other, ["q_proj", "v_proj"], r=2, alpha=3, bias="all", train_also="head")
        other(x).sum().backward()
    load(other, tmp_path, trainable=False)
    assert torch.equal(other(x), model(x))
    assert not other(x).requires_grad
    assert all(p.grad is None for p in other.parameters())
    inject(other, "o_proj", r=2, adapter="top")
    names = {name for name, p in other.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"lora_A_top", "lora_B_top"}
    use(other, "default")
    assert len(lora_parameters(other)) == len(lora_parameters(model))
    strip(other)
    assert torch.equal(other(x), bare()(x))
