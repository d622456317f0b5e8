"""Every format: loralib, kohya, diffusers, and what the configuration of PEFT decides."""

import copy
import json

import pytest
import torch
from families import FAMILIES, unet
from helpers import PEFT_WARNS, changed_parts, ids, randomize_adapters, snapshot, train_steps
from safetensors.torch import save_file
from stored_models import SAFE, bare, trained
from torch import nn

from lora_inject import (
    ArgumentError,
    FormatError,
    inject,
    load,
    lora_state_dict,
    report,
    save,
    strip,
)
from lora_inject.files.convert import convert

pytestmark = pytest.mark.usefixtures("device")


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
        ({"use_dora": True}, "nothing besides A and B, and its config asks for .*magnitude"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"something_new": 3}, "something_new=3 is not supported"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config=.* is not supported"),
        ({"velora_config": {"scale": 1.0}}, "velora_config=.* is not supported"),
        ({"monteclora_config": {"n": 4}}, "monteclora_config=.* is not supported"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config=.* is not supported"),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens=\[5, 6\] is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* is not supported"),
        ({"peft_type": "IA3"}, "it is IA3 of PEFT"),
        ({"peft_type": "ADALORA"}, "it is ADALORA of PEFT"),
        ({"init_lora_weights": "pissa_niter_4"}, "moves the weights of the base"),
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


@pytest.mark.parametrize("alpha", [0, -3, True, "3", float("nan")])
def test_alpha_is_checked(alpha, tmp_path):
    model = trained()
    save(model, tmp_path / "a.pt", format="loralib")
    with pytest.raises(ArgumentError, match="alpha"):
        load(model, tmp_path / "a.pt", alpha=alpha)
    with pytest.raises(ArgumentError, match="alpha"):
        convert(tmp_path / "a.pt", tmp_path / "b", "peft", alpha=alpha)


def test_wrapped_models_read_every_format(tmp_path):
    model, x = trained(), ids()
    save(model, tmp_path / "k.safetensors", format="kohya")
    wrapped = torch.compile(bare(), backend="eager")
    torch.testing.assert_close(load(wrapped, tmp_path / "k.safetensors")(x), model(x))


@pytest.mark.parametrize("shapes", [((0, 4), (4, 0)), ((0,), (4, 2)), ((2, 4), (0,))])
def test_what_one_rank_of_a_sharded_model_saved_is_told(shapes, tmp_path):
    keys = [f"base_model.model.q.lora_{x}.weight" for x in "AB"]
    tensors = {key: torch.empty(shape) for key, shape in zip(keys, shapes, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"A or B of q is empty: .*gather the parameters"):
        load(nn.ModuleDict({"q": nn.Linear(4, 4)}), tmp_path)


def test_a_file_for_a_part_or_for_a_whole_says_where_it_fits(tmp_path):
    whole = nn.ModuleDict({"model": nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})})
    inject(whole["model"], ["q", "k"], r=1, bias="all")
    save(whole["model"], tmp_path / "part")
    strip(whole)
    inject(whole, ["q"], r=1)
    save(whole, tmp_path / "whole")
    strip(whole)
    with pytest.raises(FormatError, match=r"for the part 'model' .* load\(model\.model, "):
        load(whole, tmp_path / "part")
    with pytest.raises(
        FormatError, match=r"the prefix 'model\.': load it into the model that holds"
    ):
        load(whole["model"], tmp_path / "whole")
    with pytest.raises(FormatError, match="another model"):
        load(nn.ModuleDict({"x": nn.Linear(4, 4)}), tmp_path / "whole")
