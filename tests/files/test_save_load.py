"""State dicts, loading in place, the base's fingerprint, resuming, and the other formats."""

import copy
import json

import pytest
import torch
import transformers as tf
from families import DECODER, FAMILIES, unet
from helpers import (
    PEFT_WARNS,
    Net,
    changed_parts,
    ids,
    randomize_adapters,
    snapshot,
    train_steps,
)
from stored_models import SAFE, Nested, bare, trained
from torch import nn

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectError,
    LoRALayer,
    disabled,
    inject,
    load,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merged,
    report,
    save,
    strip,
    use,
)
from lora_inject.files import fingerprint

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_state_dict_holds_what_was_trained(bias):
    model = trained(bias, train_also="head")
    state = lora_state_dict(model)
    owners = {"none": set(), "lora_only": {"q_proj", "v_proj"}}.get(bias)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(state) == trainable
    biases = {k.split(".")[-2] for k in state if k.endswith("bias") and not k.startswith("head")}
    assert biases == owners if owners is not None else len(biases) == 4
    x = ids()
    twin = bare()
    inject(twin, ["q_proj", "v_proj"], r=2, alpha=3, bias=bias, train_also="head")
    assert not torch.equal(twin(x), model(x))
    assert load_lora_state_dict(twin, state) is twin
    assert torch.equal(twin(x), model(x))
    before = snapshot(bare())["state"]
    strip(twin)
    assert snapshot(twin)["state"] == before


def test_another_bias_mode_would_lose_something():
    model = trained("lora_only")
    assert lora_state_dict(model, "lora_only").keys() == lora_state_dict(model).keys()
    with pytest.raises(
        ArgumentError,
        match=r"bias='none', but 'default' was trained with "
        r"bias='lora_only': 4 trained tensors, such as .*bias, would be lost",
    ):
        lora_state_dict(model, "none")  # fmt: skip
    with pytest.raises(ArgumentError, match="no bias was trained"):
        lora_state_dict(trained(), "all")


def test_keys_are_loralibs():
    loralib = pytest.importorskip("loralib")

    layer = loralib.Linear(8, 6, r=2, lora_alpha=4)
    nn.init.normal_(layer.lora_B)
    theirs = loralib.lora_state_dict(nn.Sequential(layer))
    model = nn.Sequential(nn.Linear(8, 6))
    model.load_state_dict(
        {k: v for k, v in layer.state_dict(prefix="0.").items() if "lora" not in k}
    )
    inject(model, "0", r=2, alpha=4)
    assert set(lora_state_dict(model)) == set(theirs)
    load_lora_state_dict(model, theirs)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), layer(x))


def test_an_adapter_of_several_is_named():
    model = bare()
    inject(model, "q_proj", r=2, adapter="fr")
    inject(model, "v_proj", r=2, adapter="de")
    with pytest.raises(ArgumentError, match=r"several adapters, \['de', 'fr'\]"):
        lora_state_dict(model)
    assert {key.split(".")[-2] for key in lora_state_dict(model, adapter="fr")} == {"q_proj"}
    use(model, "de")
    assert {key.split(".")[-2] for key in lora_state_dict(model)} == {"v_proj"}
    with pytest.raises(ArgumentError, match="no adapter 'es'"):
        lora_state_dict(model, adapter="es")
    with pytest.raises(LoRAInjectError, match="no adapters"):
        lora_state_dict(bare())
    for block in (merged, disabled):
        with block(model), pytest.raises(LoRAInjectError, match=r"merged now|disabled block"):
            lora_state_dict(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.q_proj.lora_A"), r"1 missing \(layers.0.q_proj.lora_A\)"),
        (lambda s: s.update({"x.lora_A": torch.ones(2)}), r"1 unexpected \(x.lora_A\)"),
        (lambda s: s.update({"layers.0.q_proj.lora_A": torch.ones(2, 9)}),
         r"1 of another shape \(layers.0.q_proj.lora_A \(2, 9\), not \(2, 8\)\)"),
        (lambda s: s.update({"layers.0.q_proj.lora_A": torch.ones(3, 8),
                             "layers.0.q_proj.lora_B": torch.ones(8, 3)}), "2 of another shape"),
        (lambda s: s["layers.0.q_proj.lora_B"].fill_(float("nan")), "1 not finite"),
        (lambda s: s["layers.0.q_proj.lora_B"].fill_(float("inf")), "1 not finite"),
        (lambda s: s.clear(), r"8 missing .*, \.\.\.\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_whole(change, message):
    model = trained()
    state = {key: value.clone() for key, value in lora_state_dict(model).items()}
    before = snapshot(model)
    change(state)
    with pytest.raises(FormatError, match=message):
        load_lora_state_dict(model, state)
    assert changed_parts(before, snapshot(model)) == []


def test_prefixes_of_wrappers_are_understood(tmp_path):
    model, x = trained(), ids()
    state = lora_state_dict(model)
    for prefix in ("module.", "_orig_mod.", "base_model.model.", "module._orig_mod."):
        twin = bare()
        inject(twin, ["q_proj", "v_proj"], r=2, alpha=3)
        load_lora_state_dict(twin, {prefix + key: value for key, value in state.items()})
        assert torch.equal(twin(x), model(x))
    wrapped = torch.compile(model, backend="eager")
    assert lora_state_dict(wrapped).keys() == state.keys()
    save(nn.DataParallel(model), tmp_path)
    assert torch.equal(load(bare(), tmp_path)(x), model(x))
    inside = torch.compile(bare(), backend="eager")
    torch.testing.assert_close(load(inside, tmp_path)(x), model(x))


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


def test_an_adapter_on_the_wrong_base_is_refused(tmp_path):
    model, x = trained(), ids()
    save(model, tmp_path)
    other = bare()
    with torch.no_grad():
        other.layers[1].v_proj.weight.mul_(1.001)
    before = snapshot(other)
    with pytest.raises(FormatError, match=r"1 of 4 adapted weights .*: layers.1.v_proj.weight\."):
        load(other, tmp_path)
    assert changed_parts(before, snapshot(other)) == []
    assert load(other, tmp_path, other_base=True) is other
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # the same base in other numbers
        load(bare().to(dtype), tmp_path)
    half = Net(dtype=torch.bfloat16)
    half.load_state_dict(bare().state_dict())
    inject(half, "q_proj", r=2)
    save(half, tmp_path / "half")
    load(bare(), tmp_path / "half")
    assert torch.equal(load(bare(), tmp_path)(x), model(x))


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


def test_a_default_device_changes_nothing_about_files(tmp_path):
    model, x = trained(), ids()
    fingerprint._places.cache_clear()
    with torch.device("meta"):
        save(model, tmp_path)
    assert torch.equal(load(bare(), tmp_path)(x), model(x))


def test_loralib_files(tmp_path):
    model, x = trained("lora_only"), ids()
    save(model, tmp_path / "adapter.pt", format="loralib")
    assert (
        torch.load(tmp_path / "adapter.pt", weights_only=True).keys()
        == lora_state_dict(model).keys()
    )
    with pytest.raises(FormatError, match=r"does not say alpha.*alpha=16"):
        load(bare(), tmp_path / "adapter.pt")
    twin = load(bare(), tmp_path / "adapter.pt", alpha=3)
    assert torch.equal(twin(x), model(x))
    assert report(twin).bias == "lora_only"
    filled = trained("lora_only", seed=0)
    train_steps(filled, x, steps=1)
    assert torch.equal(load(filled, tmp_path / "adapter.pt")(x), model(x))


def test_loralib_files_hold_every_kind(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "conv": nn.Conv1d(4, 6, 3, dilation=2),
            "lstm": nn.LSTM(4, 5),
            "attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        }
    )
    base = copy.deepcopy(model)
    targets = ["embed", "conv", "lstm", "attention"]
    inject(model, targets, r=2, alpha=3)
    randomize_adapters(model)
    save(model, tmp_path / "a.pt", format="loralib")
    load(base, tmp_path / "a.pt", alpha=3)
    state, other = lora_state_dict(model), lora_state_dict(base)
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


def adapted_unet():
    """(a UNet, a copy of it with an adapter, inputs)."""
    torch.manual_seed(0)
    base, inputs = unet(), (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 8))
    model = copy.deepcopy(base)
    inject(model, {"to_q": {"r": 2, "alpha": 1}, "conv1": {"r": 3}, "proj_in": {"r": 4}})
    randomize_adapters(model)
    return base, model, inputs


@PEFT_WARNS
def test_kohya_files(tmp_path):
    from safetensors.torch import load_file

    base, model, inputs = adapted_unet()
    file = tmp_path / "lora.safetensors"
    save(model, file, format="kohya")
    tensors = load_file(file)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{name}.lora_down.weight"].shape == (2, 8)
    assert tensors[f"{name}.alpha"].item() == 1
    ours = load(copy.deepcopy(base), file)
    torch.testing.assert_close(ours(*inputs)[0], model(*inputs)[0])
    assert torch.equal(ours.mid_block.resnets[0].conv1.lora_A,
                       model.mid_block.resnets[0].conv1.lora_A)  # fmt: skip

    # diffusers reads it as well: it is the format that A1111 and ComfyUI know.
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    other = copy.deepcopy(base)
    other.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    torch.testing.assert_close(other(*inputs)[0], model(*inputs)[0], atol=1e-5, rtol=1e-5)


def test_kohya_names_are_looked_up_and_never_guessed(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = nn.Linear(2, 2)
            self.a = nn.ModuleDict({"b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})

    model, file = Two(), tmp_path / "x.safetensors"
    inject(model, "a.c", r=1)
    save(model, file, format="kohya")
    load(Two(), file, other_base=True)
    with pytest.raises(FormatError, match="1 names are no modules of this Net: lycoris_a_c"):
        load(bare(), file)
    strip(model)
    inject(model, "a.b", r=1)
    save(model, file, format="kohya")
    with pytest.raises(FormatError, match=r"lycoris_a_b can be a_b or a\.b"):
        load(Two(), file)
    inject(model, "a_b", r=1)
    with pytest.raises(FormatError, match="same flattened name"):
        save(model, file, format="kohya")
    own = nn.Sequential(nn.Embedding(3, 2))
    inject(own, "0", r=1)
    with pytest.raises(FormatError, match="no word for this kind"):
        save(own, file, format="kohya")
    with pytest.raises(FormatError, match="holds A and B alone"):
        save(trained("all"), file, format="kohya")


@PEFT_WARNS
def test_diffusers_directories_both_ways(tmp_path):
    import peft

    base, model, inputs = adapted_unet()
    expected = model(*inputs)[0]
    save(model, tmp_path / "ours", format="diffusers")
    theirs = copy.deepcopy(base)
    theirs.load_lora_adapter(tmp_path / "ours", prefix="unet", use_safetensors=True)
    torch.testing.assert_close(theirs(*inputs)[0], expected, atol=1e-5, rtol=1e-5)
    theirs = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False,
        rank_pattern={"conv1": 2},
    )  # fmt: skip
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path / "theirs")
    reloaded = load(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(reloaded(*inputs)[0], theirs(*inputs)[0], atol=1e-5, rtol=1e-5)
    again = load(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(*inputs)[0], expected)


@PEFT_WARNS
@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_every_format_keeps_the_values(name, tmp_path):
    torch.manual_seed(0)
    family = FAMILIES[name]
    base, inputs = family.build().eval(), family.inputs()
    model = copy.deepcopy(base)
    inject(model, {t: {"r": i + 2} for i, t in enumerate(family.targets)}, alpha=3)
    randomize_adapters(model, names=["default"])
    for format, file in (("peft", "p"), ("loralib", "l.pt"), ("kohya", "k.safetensors"),
                         ("diffusers", "d")):  # fmt: skip
        save(model, tmp_path / file, format=format)
        alpha = 3 if format == "loralib" else None
        twin = load(copy.deepcopy(base), tmp_path / file, alpha=alpha)
        own, other = lora_state_dict(model), lora_state_dict(twin)
        assert all(torch.equal(own[key], other[key]) for key in own)
        torch.testing.assert_close(twin(**inputs)[0], model(**inputs)[0])


def test_the_config_decides_and_says_when_it_cannot(tmp_path):
    save(trained(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def with_config(**changes):
        edited = {k: v for k, v in {**config, **changes}.items() if v != "gone"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(edited))
        tensors, _ = read_tensors(tmp_path / SAFE)
        write_tensors(tensors, tmp_path / SAFE, {"format": "pt"})  # as PEFT has it

    from lora_inject.files.formats.storage import read_tensors, write_tensors

    for changes, message in (
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"something_new": 3}, "something_new=3 is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "moves the weights of the base"),
        ({"lora_alpha": "gone"}, r"no lora_alpha.*alpha=16"),
        ({"lora_alpha": "many"}, "no number"),
        ({"r": 3}, "the rank 3, and its tensors have 2"),
        ({"r": 10**12}, "the rank 1000000000000"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"alpha_pattern": {"(": 1}}, "cannot be used"),
        ({"modules_to_save": "head"}, "must be a list of names"),
    ):
        with_config(**changes)
        model = bare()
        before = snapshot(model)
        with pytest.raises(FormatError, match=message):
            load(model, tmp_path)
        assert changed_parts(before, snapshot(model)) == []
    with_config(lora_alpha="gone")
    assert load(bare(), tmp_path, alpha=3).layers[0].q_proj.lora_adapters[0].settings.alpha == 3


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
