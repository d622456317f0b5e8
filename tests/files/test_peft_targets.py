"""``target_modules`` of PEFT: what it selects, and tensors of which the config says nothing."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import PEFT_WARNS
from safetensors.torch import load_file, save_file
from torch import nn

from lora_inject import FormatError, load
from lora_inject.files.formats.peft_targets import require_targets

pytestmark = [PEFT_WARNS, pytest.mark.cpu("files are read on it")]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.v(self.q(x))


def stacked(base, below, above, folder):
    """PEFT's model of an adapter with alpha 16 on top of one with alpha 2, saved to a folder."""
    import peft

    def config(targets, alpha):
        return peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=targets,
                               init_lora_weights=False)  # fmt: skip

    inner = peft.get_peft_model(base, config(below, 2))
    outer = peft.get_peft_model(inner, config(above, 16)).eval()
    outer.save_pretrained(folder)
    return outer


@pytest.mark.parametrize("above", [["v"], "v|.*\\.v", ["q", "v"]])
def test_an_adapter_on_top_of_another_is_not_read_with_the_alpha_of_one(above, tmp_path):
    torch.manual_seed(0)
    base, x = Two(), torch.randn(3, 4)
    theirs = stacked(copy.deepcopy(base), ["q"], above, tmp_path)
    if above == ["q", "v"]:  # where the one below is replaced as a whole, the file is of one
        torch.testing.assert_close(load(base, tmp_path)(x), theirs(x))
    else:
        with pytest.raises(FormatError, match=r"on top of another one, and .*q is of that one"):
            load(base, tmp_path)


def test_a_wrapper_in_front_of_both_changes_nothing(tmp_path):
    stacked(Two(), ["q"], ["v"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"module.{key}": tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(FormatError, match=r"on top of another one, and .*q is of that one"):
        load(Two(), tmp_path)


def test_what_a_config_selects():
    where = Path("adapter_config.json")
    for modules in (["q"], ["a.q"], "all-linear", ".*q"):
        require_targets({"target_modules": modules}, ["x.a.q"], where)
    require_targets({"target_parameters": ["experts.up"]}, ["x.experts"], where)
    for modules in (None, ["aq"], [], "q", 3, [None]):
        with pytest.raises(FormatError, match=r"x\.a\.q is of that one"):
            require_targets({"target_modules": modules}, ["x.a.q"], where)
