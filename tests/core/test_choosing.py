"""Which of the places are kept: blocks by number, and heads that all-linear leaves."""

from dataclasses import dataclass

import pytest
import torch
from helpers import PEFT_WARNS, Net, randomize_adapters
from torch import nn
from torch.nn import functional as F

from lora_inject import (
    ArgumentError,
    LoRALayer,
    NoMatchError,
    UnsupportedLayerError,
    inject,
    plan,
    strip,
)
from lora_inject.core.choosing import OF_PEFT

pytestmark = pytest.mark.usefixtures("device")


def test_layers_by_number_where_numbers_are_not_contiguous():
    model = nn.ModuleDict({"10": nn.Linear(4, 4), "20": nn.Linear(4, 4)})
    assert [site.path for site in plan(model, nn.Linear, layers=-1).sites] == ["20"]
    assert [site.path for site in plan(model, nn.Linear, layers=10).sites] == ["10"]
    with pytest.raises(ArgumentError, match=r"layers=\[8\]"):
        plan(model, nn.Linear, layers=8)


def test_a_method_of_another_meaning_is_not_asked_for_the_head():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def get_output_embeddings(self, which):
            return which

    assert plan(Odd(), "all-linear").sites


def test_heads_of_other_families():
    import transformers as tf

    config = tf.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=24,
    )  # fmt: skip
    model = tf.BertForPreTraining(config)
    assert not any(site.path.startswith("cls.") for site in plan(model, "all-linear").sites)


def test_what_an_earlier_pattern_has_chosen_is_not_asked_of_later_ones():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    plan(model, {"out_proj": {"dropout": 0.0}, nn.Linear: {"dropout": 0.1}}, r=1)
    with pytest.raises(UnsupportedLayerError, match=r"dropout=0\.1"):
        plan(model, {nn.Linear: {"dropout": 0.1}, "out_proj": {"dropout": 0.0}}, r=1)


def test_blocks_that_stand_twice_in_a_list_count_twice():
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleList([block, nn.Sequential(nn.Linear(4, 4)), block])
    assert [site.path for site in plan(model, nn.Linear, r=1, layers=-1).sites] == ["0.0"]
    assert [site.path for site in plan(model, nn.Linear, r=1, layers=1).sites] == ["1.0"]


def test_what_is_tied_to_a_layer_that_trains_in_full_is_not_adapted():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["emb"].weight
    model["fc"] = nn.Linear(3, 3)
    inject(model, "fc", r=1, adapter="a", train_also="emb")
    for target in ("emb", "head"):
        with pytest.raises(UnsupportedLayerError, match=r"emb: .*trains it in full"):
            plan(model, target, r=1, adapter="b")


class OtherLinear(nn.Module):
    """As libraries for graphs have one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.linear(x, self.weight)


class HomeMade(nn.Module):
    """Matrices by names of their own, and parameters that are no matrices of a product."""

    def __init__(self):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
        self.W = nn.Parameter(torch.randn(8, 8))
        self.K = nn.Parameter(torch.randn(8, 8))
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.fc, self.table = nn.Linear(8, 8), nn.EmbeddingBag(5, 8)

    def forward(self, x):
        x = x + self.positions
        x = torch.einsum("...i,oi->...o", x, self.K)
        return self.fc(x @ self.W)


MATRICES = ["lin.weight", "own.K", "own.W", "own.in_proj_weight", "pair.weight"]


def odd_model():
    return nn.ModuleDict({"lin": OtherLinear(), "own": HomeMade(), "pair": nn.Bilinear(8, 8, 8)})


def test_all_linear_names_every_matrix_that_it_leaves():
    shown = plan(odd_model(), r=2)
    assert [site.path for site in shown.sites] == ["own.fc"]
    assert sorted(skip.path for skip in shown.skipped) == MATRICES
    notes = " ".join(inject(odd_model(), r=2).notes)
    assert "pair.weight" in notes
    assert "name it to adapt it" in notes


def test_what_is_named_so_can_be_adapted_by_its_name():
    model = odd_model()
    targets = {path: {"layout": "out_in"} if path == "pair.weight" else {} for path in MATRICES}
    assert len(plan(model, targets, r=2).sites) == len(MATRICES)
    assert not plan(model, targets, r=2).skipped
    inject(model, targets, r=2)
    x = torch.randn(5, 8)
    randomize_adapters(model)
    for y in (model["lin"](x), model["own"](x), model["pair"](x, x)):
        y.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lin.lora" in n)


def test_a_test_that_selects_is_asked_about_modules_alone():
    asked, model = [], odd_model()

    def fc(path, module):
        asked.append(path)
        return path == "own.fc"

    assert not plan(model, fc, r=1).skipped
    assert sorted(asked) == sorted(path for path, _ in model.named_modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_matrix_of_a_scripted_module_is_named_with_what_to_do():
    model = nn.ModuleDict({"lin": torch.jit.script(OtherLinear()), "fc": nn.Linear(8, 8)})
    (skip,) = plan(model, r=2).skipped
    assert skip.path == "lin.weight"
    assert "Adapt it before scripting" in skip.reason
    with pytest.raises(NoMatchError, match=r"Names that can be adapted: fc\.$"):
        plan(model, "lin", r=2)  # and no matrix of it


def test_the_only_matrix_of_a_layer_is_the_layer():
    """As PEFT's target_parameters names it; nothing else of a layer, and not the word alone."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"lin1": nn.Linear(8, 8), "lin2": nn.Linear(8, 8)})})
    model["lstm"], model["conv"] = nn.LSTM(8, 8), nn.Conv2d(3, 8, 3)
    shown = plan(model, {"lin1.weight": {"r": 2}, "conv.weight": {"r": 1}})
    assert [(site.path, site.settings.r) for site in shown.sites] == [("a.lin1", 2), ("conv", 1)]
    inject(model, "a.lin1.weight", r=2)
    assert type(model["a"]["lin1"]).__name__ == "LoRALinear"
    inject(model, "lin1.weight", r=2, adapter="second")  # whose A and B are no matrices of its own
    for wrong in ("lin1.bias", "weight", "lstm.weight_ih_l0", "n1.weight"):
        with pytest.raises(NoMatchError, match="matches nothing"):
            plan(model, wrong, r=1)


def test_what_is_excluded_or_trains_in_full_or_lies_elsewhere_is_not_named():
    model = nn.ModuleList([odd_model(), odd_model()])
    shown = plan(model, r=2, exclude="0.own", train_also="0.pair")
    assert {skip.path for skip in shown.skipped if skip.wanted} == {
        "0.lin.weight", *(f"1.{path}" for path in MATRICES)
    }  # fmt: skip
    shown = plan(model, r=2, layers=-1)
    assert {s.path for s in shown.skipped if s.wanted} == {f"1.{path}" for path in MATRICES}


def test_a_layer_of_no_known_kind_points_to_its_matrices():
    with pytest.raises(NoMatchError, match=r"Name its matrices instead, such as lin\.weight"):
        inject(odd_model(), "lin", r=2)


def test_a_glob_that_selects_layers_names_the_matrices_that_it_leaves():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 2
            self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 8))

    model = nn.ModuleDict({"experts": Experts(), "shared": nn.ModuleDict()})
    model["shared"]["up_proj"] = nn.Linear(8, 8)
    shown = plan(model, "*up_proj", r=2)
    assert [site.path for site in shown.sites] == ["shared.up_proj"]
    assert [skip.path for skip in shown.skipped] == ["experts.gate_up_proj"]
    assert any("experts.gate_up_proj" in n for n in inject(model, "*up_proj", r=2).notes)
    assert not plan(odd_model(), "*fc", r=2).skipped


def test_modules_that_compare_by_value_are_refused():
    """torch takes equal ones for one: the second would be neither adapted nor frozen."""

    @dataclass(unsafe_hash=True)
    class Hashed(nn.Module):
        size: int

        def __post_init__(self):
            super().__init__()
            self.q = nn.Linear(self.size, self.size)

    @dataclass
    class Unhashed(Hashed):
        pass

    for cls in (Hashed, Unhashed):
        model = nn.ModuleList([cls(4), cls(4)])
        with pytest.raises(UnsupportedLayerError, match=f"compare by value .{cls.__name__}"):
            inject(model, "q", r=2)
        assert type(model[0].q) is nn.Linear
    inject(nn.ModuleList([Hashed(4), Hashed(5)]), "q", r=2)  # which are not equal


@PEFT_WARNS
@pytest.mark.parametrize("target", ["all-linear", nn.Linear, "*v_proj*", "re:.*proj.*"])
def test_what_adapters_of_peft_are_made_of_is_adapted_where_it_is_named_alone(target):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["v_proj"], r=2))
    shown = plan(model, target, r=2)
    assert {skip.path for skip in shown.skipped if skip.reason == OF_PEFT} >= {
        f"base_model.model.layers.{i}.v_proj.lora_{name}.default" for i in (0, 1) for name in "AB"
    }
    inject(model, target, r=2)
    for layer in model.base_model.model.layers:
        assert isinstance(layer.v_proj.base_layer, LoRALayer)
        assert not any(isinstance(m, LoRALayer) for m in layer.v_proj.lora_A.modules())
    strip(model)
    assert len(plan(model, "lora_A.default", r=1).sites) == 2


def test_a_pattern_that_adds_nothing_is_one_that_says_nothing_else():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    assert len(plan(model, [nn.Linear, "q"], r=1).sites) == 2
    assert len(plan(model, {nn.Linear: {"r": 2}, "q": {"r": 2}}).sites) == 2
    with pytest.raises(NoMatchError, match="'class Linear' has chosen before"):
        plan(model, {nn.Linear: {"r": 2}, "q": {"r": 3}})


def test_what_cannot_be_adapted_is_told_of_ten_layers_and_counted_beyond():
    def refused(number):
        model = nn.ModuleList([nn.Linear(4, 4, device="meta") for _ in range(number)])
        for layer in model:
            layer.forward = layer.forward
        with pytest.raises(UnsupportedLayerError) as caught:
            plan(model, nn.Linear, r=1)
        return str(caught.value).splitlines()

    for number in (1, 2, 10):
        lines = refused(number)
        assert [line.split(":")[0] for line in lines] == [str(i) for i in range(number)]
    assert [line.split(":")[0] for line in refused(11)[:-1]] == [str(i) for i in range(10)]
    assert refused(11)[-1] == "... and 1 more."


def test_a_pattern_that_chooses_nothing_says_what_it_met():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcdefgh"})
    model["inner"] = nn.ModuleDict({name: nn.Linear(4, 4) for name in "stuvwxyz"})
    with pytest.raises(NoMatchError, match="It selects 16 layers: excluded by '\\*'"):
        plan(model, nn.Linear, r=1, exclude="*")
    with pytest.raises(NoMatchError, match=r"can be: inner\.s, .*, inner\.x and 2 more\.$"):
        plan(model, "inner", r=1)
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)})
    with pytest.raises(NoMatchError, match="Names that can be adapted: fc"):
        plan(model, "norm", r=1)
    matrices = nn.Module()
    for i in range(7):
        matrices.register_parameter(f"m{i}", nn.Parameter(torch.randn(4, 4)))
    with pytest.raises(NoMatchError, match=r"such as m\.m0, .*, m\.m5 and 1 more\.$"):
        plan(nn.ModuleDict({"m": matrices}), "m", r=1)


def test_a_matrix_says_whether_it_needs_a_layout():
    reasons = {skip.path: skip.reason for skip in plan(odd_model(), r=2).skipped}
    assert reasons["lin.weight"] == "a matrix and no layer: name it to adapt it"
    assert (
        reasons["pair.weight"] == "a fused weight and no layer: name it to adapt it, with layout="
    )


def test_of_what_a_glob_passes_over_only_layers_with_parameters_are_named():
    model = nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(4, 4), "act": nn.ReLU()}) for _ in "ab"))
    for block in model:
        block["norm"], block["plain"] = nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)
    for layers, outside in ((None, {}), ([1], {"0.fc": "not in layers="})):
        shown = plan(model, "*", r=1, layers=layers)
        kept = [f"{i}.norm" for i in (0, 1)]
        told = dict.fromkeys(kept, "no kind of layer that can be adapted")
        assert {skip.path: skip.reason for skip in shown.skipped} == told | outside


def test_a_kernel_that_is_tied_to_an_unknown_one_has_no_layout_there():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3), "other": nn.Module()})
    model["other"].kernel = model["conv"].weight
    with pytest.raises(UnsupportedLayerError, match="shape tells no layout"):
        plan(model, "conv", r=1)
