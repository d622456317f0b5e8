"""What a file would hold, without the file: for other libraries, and back."""

import copy
import pickle

import pytest
import torch
from helpers import PEFT_WARNS, ids
from stored_models import bare, trained

from lora_inject import (
    ArgumentError,
    FormatError,
    inject,
    load,
    load_lora_state_dict,
    lora_state_dict,
    save,
    strip,
)
from lora_inject.files.formats.storage import read_json, read_tensors

pytestmark = pytest.mark.usefixtures("device")
FORMATS = ["peft", "diffusers", "kohya"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "way", [lambda s: s, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_state_goes_there_and_back(format, way):
    model, x = trained(), ids()
    state = way(lora_state_dict(model, format=format))
    new, filled = bare(), trained(seed=0)
    load(new, state)
    load(filled, state)
    assert torch.equal(new(x), model(x))
    assert torch.equal(filled(x), model(x))
    assert all(tensor.is_contiguous() for tensor in state.values())
    strip(new)
    assert torch.equal(new(x), bare()(x))


def test_a_state_is_what_the_file_holds(tmp_path):
    model = trained("lora_only", train_also="head")
    state = lora_state_dict(model, format="peft")
    save(model, tmp_path)
    tensors, metadata = read_tensors(tmp_path / "adapter_model.safetensors")
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key].cpu(), tensors[key]) for key in state)
    assert state.config == read_json(tmp_path / "adapter_config.json")
    assert state.metadata.items() <= metadata.items()
    other = bare()
    with torch.no_grad():
        other.layers[0].q_proj.weight.mul_(2)
    with pytest.raises(FormatError, match="not those that the adapter was made for"):
        load(other, state)


@PEFT_WARNS
def test_states_of_peft_both_ways():
    import peft

    model, x = trained(), ids()
    state = lora_state_dict(model, format="peft")
    config = peft.LoraConfig(**state.config)
    theirs = peft.get_peft_model(bare(), config)
    peft.set_peft_model_state_dict(theirs, dict(state))
    torch.testing.assert_close(theirs(x), model(x))
    back = bare()
    tensors = peft.get_peft_model_state_dict(theirs)
    load(back, tensors, format="peft", config=theirs.peft_config["default"].to_dict())
    torch.testing.assert_close(back(x), model(x))


def test_states_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    def unet():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        )  # fmt: skip

    model, inputs = unet(), (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 2, 16))
    inject(model, ["to_q", "to_v"], r=2, alpha=6)
    torch.nn.init.normal_(model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.lora_B)
    state = lora_state_dict(model, format="diffusers")
    theirs, back, saved = unet(), unet(), unet()
    theirs.load_lora_adapter(dict(state), prefix=None, metadata=state.config)
    with torch.no_grad():
        y = model(*inputs).sample
        torch.testing.assert_close(theirs(*inputs).sample, y)
        load(back, state)
        assert torch.equal(back(*inputs).sample, y)
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=dict(state), unet_lora_adapter_metadata=state.config
        )
        load(saved, tmp_path)
        assert torch.equal(saved(*inputs).sample, y)


def test_arguments():
    model = trained()
    state = lora_state_dict(model, format="peft")
    for wrong in ("loralib", "x", 3):
        with pytest.raises(ArgumentError, match="format must be"):
            lora_state_dict(model, format=wrong)
        with pytest.raises(ArgumentError, match="format must be"):
            load(bare(), dict(state), format=wrong)
    with pytest.raises(ArgumentError, match=r"format must be .*load_lora_state_dict takes"):
        load(bare(), lora_state_dict(model))
    with pytest.raises(ArgumentError, match="shards"):
        lora_state_dict(model, format="peft", full=False)
    with pytest.raises(ArgumentError, match="config goes with tensors"):
        load(bare(), "x", config={})
    with pytest.raises(FormatError, match=r"the state dict.*peft_type"):
        load(bare(), dict(state), format="peft")
    with pytest.raises(FormatError, match="8 missing"):
        load_lora_state_dict(model, state)
