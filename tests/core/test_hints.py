"""Words of other libraries: the message says what they are here, and nothing has changed."""

import pytest
from families import llama
from torch import nn

from lora_inject import ArgumentError, NoMatchError, freeze, inject, load, plan, save

pytestmark = pytest.mark.cpu("messages are the same everywhere")


@pytest.mark.parametrize("call", [inject, plan])
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("target_modules", "targets"), ("rank", "r"), ("lora_alpha", "alpha"),
        ("modules_to_save", "train_also"), ("use_dora", 'variant="dora"'), ("tragets", "targets"),
    ],
)  # fmt: skip
def test_an_argument_of_another_name(call, name, meant):
    with pytest.raises(ArgumentError, match=f"no argument '{name}'. Here it is {meant}"):
        call(llama(), **{name: 4})


def test_an_argument_that_is_like_none_says_which_there_are():
    with pytest.raises(ArgumentError, match="There are model, targets, r, alpha"):
        inject(llama(), zzzzzz=1)


@pytest.mark.parametrize(
    ("name", "where"),
    [("lr", "The optimizer has it"), ("task_type", "Leave it out"), ("inference_mode", "load")],
)
def test_an_argument_that_is_elsewhere_says_where(name, where):
    with pytest.raises(ArgumentError, match=f"no argument '{name}'. {where}"):
        inject(llama(), "q_proj", **{name: 1})


@pytest.mark.parametrize("call", [inject, plan])
def test_a_rank_without_its_name_is_said_to_need_one(call):
    message = "only model and targets can be given without a name, not 8. Say what it is, as in r=8"
    with pytest.raises(ArgumentError, match=message):
        call(llama(), "q_proj", 8)


def test_a_config_of_peft_is_said_in_arguments():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"])
    with pytest.raises(ArgumentError, match=r"targets=\['q_proj', 'v_proj'\], r=4, alpha=8\."):
        inject(llama(), config)
    config = peft.LoraConfig(target_modules=".*q_proj", lora_dropout=0.1)
    with pytest.raises(ArgumentError, match=r"targets='re:\.\*q_proj', .*dropout=0.1"):
        inject(llama(), config)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("q_proj|v_proj", "re:.*(q_proj|v_proj)"),
        (r".*\.(q_proj|v_proj)", r"re:.*\.(q_proj|v_proj)"),
    ],
)
def test_a_regular_expression_without_its_mark_says_it_and_what_is_said_works(written, meant):
    with pytest.raises(NoMatchError) as caught:
        inject(llama(), written)
    assert f'"{meant}"' in str(caught.value)
    assert len(plan(llama(), meant).sites) == len(plan(llama(), ["q_proj", "v_proj"]).sites)


def test_train_also_that_matches_nothing_names_candidates():
    for call in (
        lambda m: inject(m, "q_proj", train_also=["zzz"]),
        lambda m: freeze(m, "none", "z"),
    ):
        with pytest.raises(NoMatchError, match="There are lm_head, model"):
            call(llama())
    with pytest.raises(NoMatchError, match="Close names: lm_head"):
        inject(llama(), "q_proj", train_also=["lm_haed"])


def test_swapped_arguments(tmp_path):
    model = llama()
    inject(model, "q_proj", r=2)
    with pytest.raises(ArgumentError, match=r"not a LlamaForCausalLM\. The model comes first"):
        save(tmp_path, model)
    with pytest.raises(ArgumentError, match=r"not a str\. The model comes first"):
        load(str(tmp_path), model)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ArgumentError, match=r"model must be an nn\.Module, not a int"):
        save(5, tmp_path)


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_a_dtype_by_its_name(name):
    layer = nn.Sequential(nn.Linear(4, 4))
    inject(layer, "0", r=2, dtype=name)
    assert str(layer[0].lora_A.dtype) == "torch.bfloat16"
    with pytest.raises(ArgumentError, match='"bf16"'):
        plan(nn.Sequential(nn.Linear(4, 4)), "0", dtype="int8")
