"""Adapters of a whole pipeline in one file: each component takes its part, all or none."""

import pytest
import torch
from helpers import snapshot
from image_models import build, changes, pipeline, random_layer, save_tensors, update
from safetensors.torch import load_file

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectWarning,
    inject,
    load,
    load_pipeline,
    lora_state_dict,
    save,
    save_pipeline,
)
from lora_inject.files.loading import Loading

SDXL = {"unet": "sdxl", "text_encoder": "clip", "text_encoder_2": "clip_with_projection"}
TARGETS = ["to_q", "q_proj"]
FILE = "pytorch_lora_weights.safetensors"


def adapted(names=SDXL, **options):
    pipe = pipeline(**names)
    for model in pipe.components.values():
        inject(model, lambda path, _: path.endswith(tuple(TARGETS)), r=2, alpha=3, **options)
        for key, parameter in model.named_parameters():
            if key.rpartition(".")[2].startswith("lora_B"):
                torch.nn.init.normal_(parameter)
    return pipe


def is_same(one, other, **adapter):
    pairs = zip(one.components.values(), other.components.values(), strict=True)
    for left, right in pairs:
        states = lora_state_dict(left, **adapter), lora_state_dict(right)
        if states[0].keys() != states[1].keys():
            return False
        if not all(torch.equal(states[0][key], states[1][key]) for key in states[0]):
            return False
    return True


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_pipeline_comes_back_in_one_call_or_component_by_component(format, tmp_path):
    pipe, path = adapted(), tmp_path / ("a.safetensors" if format == "kohya" else "a")
    save_pipeline(pipe, path, format=format)
    all_at_once, one_by_one = pipeline(**SDXL), pipeline(**SDXL)
    assert load_pipeline(all_at_once, path) is all_at_once
    assert is_same(all_at_once, pipe)
    for model in one_by_one.components.values():
        with pytest.warns(LoRAInjectWarning, match="for other parts of a pipeline and are left"):
            load(model, path)
    assert is_same(one_by_one, pipe)
    if format == "diffusers":
        load_pipeline(other := pipeline(**SDXL), (path / FILE).rename(tmp_path / "b.safetensors"))
        assert is_same(other, pipe)
    load_pipeline(pipe, path if format == "kohya" else tmp_path / "b.safetensors")  # fills them
    assert is_same(pipe, all_at_once)


def test_a_second_save_of_diffusers_adds_its_component(tmp_path):
    pipe = adapted(bias="lora_only")
    with torch.no_grad():
        pipe.components["text_encoder"].encoder.layers[0].self_attn.q_proj.bias.add_(1)
    for model in pipe.components.values():
        save(model, tmp_path, format="diffusers")
    before = load_file(tmp_path / FILE)
    assert {key.partition(".")[0] for key in before} == {*SDXL}
    load_pipeline(back := pipeline(**SDXL), tmp_path)
    assert is_same(back, pipe)
    encoder = pipe.components["text_encoder"]
    with torch.no_grad():
        encoder.encoder.layers[1].self_attn.q_proj.lora_B.add_(1)
    save(encoder, tmp_path, format="diffusers")  # again: its own part is another, the rest stays
    after = load_file(tmp_path / FILE)
    assert after.keys() == before.keys()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {"text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight"}
    load_pipeline(again := pipeline(**SDXL), tmp_path)
    assert is_same(again, pipe)
    save_pipeline(pipeline_of := adapted({"unet": "sd"}), tmp_path)  # which writes all of it anew
    assert {key.partition(".")[0] for key in load_file(tmp_path / FILE)} == {"unet"}
    load_pipeline(other := pipeline(unet="sd"), tmp_path)
    assert is_same(other, pipeline_of)


def test_all_components_or_none(tmp_path, monkeypatch):
    save_pipeline(adapted(), tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    wrong = next(k for k in tensors if k.startswith("lora_te2") and k.endswith("up.weight"))
    save_tensors({**tensors, wrong: torch.ones(3, 2)}, tmp_path / "b.safetensors")
    pipe = pipeline(**SDXL)
    before = [snapshot(model) for model in pipe.components.values()]
    with pytest.raises(FormatError, match="of another shape"):
        load_pipeline(pipe, tmp_path / "b.safetensors")
    assert [snapshot(model) for model in pipe.components.values()] == before

    put_in = Loading.apply

    def interrupted(loading):
        if hasattr(loading.look.model, "text_model"):  # the last one
            raise KeyboardInterrupt
        put_in(loading)

    monkeypatch.setattr(Loading, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_pipeline(pipe, tmp_path / "a.safetensors")
    assert [snapshot(model) for model in pipe.components.values()] == before
    trained = adapted()
    values = [lora_state_dict(model) for model in trained.components.values()]
    values = [{key: t.clone() for key, t in own.items()} for own in values]
    with pytest.raises(KeyboardInterrupt):
        load_pipeline(trained, tmp_path / "a.safetensors")
    for own, model in zip(values, trained.components.values(), strict=True):
        assert all(torch.equal(own[key], t) for key, t in lora_state_dict(model).items())


def test_what_no_component_takes_is_said(tmp_path):
    save_pipeline(adapted(), tmp_path / "a.safetensors", format="kohya")
    pipe = pipeline(unet="sdxl", text_encoder="clip")
    with pytest.warns(LoRAInjectWarning, match="holds 2 layers of lora_te2 too") as said:
        load_pipeline(pipe, tmp_path / "a.safetensors")
    assert len(said) == 1
    with pytest.raises(FormatError, match="holds nothing for text_encoder_3"):
        load_pipeline(pipeline(text_encoder_3="t5"), tmp_path / "a.safetensors")


def test_the_first_encoder_of_two_and_the_only_one(tmp_path):
    for names, front in ((SDXL, "lora_te1_"), ({"unet": "sd", "text_encoder": "clip"}, "lora_te_")):
        save_pipeline(adapted(names), tmp_path / "a.safetensors", format="kohya")
        keys = [k for k in load_file(tmp_path / "a.safetensors") if "text_model" in k]
        assert any(key.startswith(front) for key in keys)
        assert all(key.startswith((front, "lora_te2_")) for key in keys)


def test_encoders_of_one_size_are_told_by_their_names(tmp_path):
    """A lone model takes what fits it; in a pipeline its name decides."""
    both = {"text_encoder": "clip_with_projection", "text_encoder_2": "clip_with_projection"}
    one, two = (random_layer(build("clip_with_projection"), ["text_projection"]) for _ in "ab")
    names = [f"lora_te{i}_text_projection.lora_{x}.weight" for i in (1, 2) for x in ("down", "up")]
    tensors = dict(zip(names, (*one, *two), strict=True))
    save_tensors(tensors, tmp_path / "a.safetensors")
    pipe = pipeline(**both)
    load_pipeline(pipe, tmp_path / "a.safetensors")
    for model, pair in zip(pipe.components.values(), (one, two), strict=True):
        found = changes(build("clip_with_projection"), model)
        torch.testing.assert_close(found["text_projection"], update(*pair, None))
    with pytest.warns(LoRAInjectWarning, match="1 layer of lora_te1"):
        alone = load(build("clip_with_projection"), tmp_path / "a.safetensors")
    found = changes(build("clip_with_projection"), alone)
    torch.testing.assert_close(found["text_projection"], update(*two, None))


def test_adapters_by_name_and_frozen_ones(tmp_path):
    pipe = adapted(adapter="style")
    inject(pipe.components["unet"], "to_k", r=1, adapter="other")
    with pytest.raises(ArgumentError, match=r"adapter='x': no component has it, of unet, text_enc"):
        save_pipeline(pipe, tmp_path, adapter="x")
    save_pipeline(pipe, tmp_path, adapter="style")
    back = load_pipeline(pipeline(**SDXL), tmp_path, adapter="mine", trainable=False)
    assert is_same(pipe, back, adapter="style")
    assert not any(p.requires_grad for m in back.components.values() for p in m.parameters()
                   if p.dim() == 2 and p.shape[0] == 2)  # fmt: skip
    save_pipeline(pipe, tmp_path, adapter="other")
    assert {key.partition(".")[0] for key in load_file(tmp_path / FILE)} == {"unet"}


def test_errors_name_the_remedy(tmp_path):
    pipe = adapted()
    for format in ("peft", "loralib"):
        with pytest.raises(ArgumentError, match=r"one of \['kohya', 'diffusers'\] for a pipeline"):
            save_pipeline(pipe, tmp_path / "a", format=format)
    save(pipe.components["unet"], tmp_path / "peft")
    with pytest.raises(ArgumentError, match=r"for a pipeline.*load\(pipe\.unet"):
        load_pipeline(pipe, tmp_path / "peft")
    with pytest.raises(ArgumentError, match=r"pipe must have models.*save\(model"):
        save_pipeline(pipe.components["unet"], tmp_path / "a")
    with pytest.raises(ArgumentError, match="no component has it"):
        save_pipeline(pipeline(**SDXL), tmp_path / "a")
    pipe.components["vae"] = torch.nn.Sequential(torch.nn.Linear(2, 2))
    save_pipeline(pipe, tmp_path / "a")
    inject(pipe.components["vae"], "0", r=1)
    with pytest.raises(FormatError, match=r"vae has an adapter.*save\(pipe\.vae"):
        save_pipeline(pipe, tmp_path / "a")
    two = {"transformer": "flux", "transformer_2": "flux"}
    pipe = pipeline(**two)
    for model in pipe.components.values():
        inject(model, "x_embedder", r=1)
    with pytest.raises(FormatError, match="two components have one name"):
        save_pipeline(pipe, tmp_path / "b.safetensors", format="kohya")
    save_pipeline(pipe, tmp_path / "b")
    load_pipeline(back := pipeline(**two), tmp_path / "b")
    assert is_same(back, pipe)
