"""What was done to a model after inject is told, and refused where something would be lost."""

import copy
import types
import warnings

import pytest
import torch
from helpers import Net, randomize_adapters
from torch import nn

from lora_inject import (
    LoRAInjectError,
    LoRAInjectWarning,
    freeze,
    inject,
    load,
    lora_parameters,
    lora_state_dict,
    merge,
    remove,
    report,
    save,
    strip,
    use,
)
from lora_inject.core.drift import drift
from lora_inject.core.look import Look

KINDS = ("gone", "came", "thawed", "frozen", "class", "forward")
GONE = r"layers\.0\.q_proj had something of an adapter and were replaced .*freeze\(model\) takes"


def net(**options):
    model = Net()
    inject(model, ["q_proj", "v_proj"], r=2, **options)
    randomize_adapters(model)
    return model


def replaced():
    model = net()
    model.layers[0].q_proj = nn.Linear(8, 8)
    return model


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args, **kwargs)


def found(model):
    return [(each.kind, each.path) for each in drift(Look(model), *KINDS)]


# --- what has not drifted -----------------------------------------------------------------------


def used():
    model = net()
    inject(model, ["q_proj"], r=2, adapter="b", bias="all", train_also=["head"])
    return use(model, "default", train=["b"])


def moved():
    model = net()
    model.layers = nn.ModuleList(reversed(model.layers))
    return nn.Sequential(model)


def checkpointed():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    model = net()
    model.layers[0] = checkpoint_wrapper.checkpoint_wrapper(model.layers[0])
    return model


def stripped_part():
    model = net()
    inject(model.layers[0], ["q_proj"], r=2, adapter="part")
    strip(model.layers[0])
    return model


MAKES = [net, used, moved, checkpointed, stripped_part, lambda: copy.deepcopy(net()),
         lambda: remove(used(), "b"), lambda: net(train_also=["head"], bias="all")]  # fmt: skip


@pytest.mark.parametrize("make", MAKES)
def test_what_our_own_verbs_and_wrappers_do_is_no_drift(make):
    assert found(make()) == []


# --- gone ---------------------------------------------------------------------------------------


def test_saving_without_a_layer_that_was_replaced_is_refused(tmp_path):
    model = replaced()
    for call in (lambda: save(model, tmp_path / "a"), lambda: lora_state_dict(model)):
        with pytest.raises(LoRAInjectError, match=GONE):
            call()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("call", [lora_parameters, merge, strip, lambda m: use(m, "default")])
def test_other_verbs_say_what_was_replaced(call):
    with pytest.warns(LoRAInjectWarning, match=GONE):
        call(replaced())
    model = replaced()
    assert any(n.startswith("layers.0.q_proj had") for n in report(model).notes)


def test_putting_it_back_is_a_remedy(tmp_path):
    model = net()
    layer = model.layers[0].q_proj
    model.layers[0].q_proj = nn.Linear(8, 8)
    model.layers[0].q_proj = layer
    quiet(save, model, tmp_path)


def test_injecting_again_is_a_remedy(tmp_path):
    model = replaced()
    inject(model, ["layers.0.q_proj"], r=2)
    quiet(save, model, tmp_path)
    other = load(Net(), tmp_path, other_base=True)
    assert len(Look(other).layers) == len(Look(model).layers)


def test_freeze_takes_the_model_as_it_is(tmp_path):
    model = replaced()
    with pytest.warns(LoRAInjectWarning, match=GONE):
        freeze(model)
    assert found(model) == []
    quiet(save, model, tmp_path)
    quiet(use, model, "default")


def test_blocks_that_were_taken_out_are_named():
    model = net()
    model.layers = nn.ModuleList([model.layers[1]])
    gone = [path for kind, path in found(model) if kind == "gone"]
    assert gone == ["layers.0.q_proj", "layers.0.v_proj"]


def test_a_head_that_an_adapter_trains_and_that_was_replaced_is_missed(tmp_path):
    model = net(train_also=["head"])
    model.head = nn.Linear(8, 3)
    with pytest.raises(LoRAInjectError, match="head had something of an adapter"):
        save(model, tmp_path)
    with pytest.warns(LoRAInjectWarning, match="head had something"):
        freeze(model, train_also=["head"])
    quiet(save, model, tmp_path)
    assert "head.weight" in lora_state_dict(model)


def test_an_adapter_that_has_lost_nothing_is_saved(tmp_path):
    model = net()
    inject(model, ["head"], r=2, adapter="b")
    randomize_adapters(model)
    model.layers[0].q_proj = nn.Linear(8, 8).requires_grad_(False)
    quiet(save, model, tmp_path, adapter="b")


def test_float8_training_replaces_layers():
    float8 = pytest.importorskip("torchao.float8")
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    inject(model, "0", r=2)
    float8.convert_to_float8_training(model)
    assert ("gone", "0") in found(model)


# --- came ---------------------------------------------------------------------------------------


def test_projections_that_were_fused_beside_adapted_ones_are_told_when_merging():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention

    assert diffusers
    model = nn.Sequential(Attention(16, heads=2, dim_head=8))
    inject(model, ["to_q", "to_v"], r=2)
    model[0].fuse_projections()
    with pytest.warns(LoRAInjectWarning, match=r"0\.to_qkv came into the model since inject"):
        merge(model)


def test_a_convolution_into_which_a_norm_was_fused_has_a_new_bias():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    inject(model, "0", r=2)
    model[0], model[1] = nn.utils.fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    with pytest.warns(LoRAInjectWarning, match=r"0\.bias came into the model since inject"):
        merge(model)


# --- thawed and frozen --------------------------------------------------------------------------


def test_what_was_thawed_is_told_and_freeze_makes_it_an_adapters():
    model = net()
    model.head.requires_grad_(True)
    assert found(model) == [("thawed", "head.weight"), ("thawed", "head.bias")]
    told = r"head\.weight, head\.bias train, which inject had frozen"
    with pytest.warns(LoRAInjectWarning, match=told):
        lora_parameters(model)
    freeze(model, train_also=["head"])
    assert found(model) == []
    before = model.head.weight.detach().clone()
    model.head.weight.data.add_(1)
    quiet(strip, model)
    assert torch.equal(model.head.weight, before)


def test_strip_says_that_it_leaves_what_was_thawed():
    model = net()
    model.head.requires_grad_(True)
    with pytest.warns(LoRAInjectWarning, match="strip leaves them as they are"):
        strip(model)


def test_adapters_that_were_frozen_by_hand_are_told():
    model = net()
    model.layers[0].requires_grad_(False)
    with pytest.warns(LoRAInjectWarning, match=r"layers\.0\.q_proj\.lora_A.* were frozen since"):
        lora_parameters(model)
    use(model, "default")
    quiet(lora_parameters, model)


# --- classes and forwards -----------------------------------------------------------------------


def test_a_class_that_was_put_back_by_hand_is_told():
    model = net()
    model.layers[0].q_proj.__class__ = nn.Linear
    with pytest.warns(LoRAInjectWarning, match=r"layers\.0\.q_proj have another class since"):
        lora_parameters(model)


def test_a_forward_on_the_instance_is_noted():
    model = net()
    layer = model.layers[0].q_proj
    layer.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight), layer)
    (note,) = report(model).notes
    assert note.startswith("layers.0.q_proj had a forward set on the instance since")
