"""The report: counted by hand, against peers, and against what an optimizer really holds."""

import json

import peft
import pytest
import torch
from families import FAMILIES
from helpers import PEFT_WARNS, Net, ids
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lora_inject import ArgumentError, freeze, inject, lora_parameters, plan, report
from lora_inject.report.bytes import OPTIMIZER_STATES

pytestmark = pytest.mark.cpu("it counts, and computes next to nothing")


@pytest.fixture(scope="module")
def gpt2_small():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    return model, inject(model, targets=["c_attn"], r=4)


def test_gpt2_small_counted_by_hand(gpt2_small):
    _, shown = gpt2_small
    assert shown.frozen == 124_439_808
    assert shown.trainable == 12 * 4 * (768 + 3 * 768) == 147_456
    assert shown.total == 124_439_808 + 147_456
    assert shown.percent == pytest.approx(100 * 147_456 / 124_587_264)
    assert shown.split == {
        "lora_A": 12 * 4 * 768, "lora_B": 12 * 4 * 3 * 768, "bias": 0, "train_also": 0, "other": 0,
    }  # fmt: skip
    memory = shown.memory
    assert memory.trainable.total == 16 * 147_456 == 2_359_296
    assert memory.full.total == 16 * 124_439_808 == 1_991_036_928
    assert memory.frozen.total == 4 * 124_439_808
    assert round(memory.ratio) == 844


def test_gpt2_small_as_it_prints(gpt2_small):
    _, shown = gpt2_small
    text = str(shown)
    for part in ("147,456 of 124,587,264", "0.1184 %", "2.36 MB", "1.99 GB", "844 times", "c_attn"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_html_and_dict(gpt2_small):
    _, shown = gpt2_small
    html = shown._repr_html_()
    assert html.startswith("<div><p")
    assert "147,456" in html
    plain = json.loads(json.dumps(shown.to_dict()))
    assert plain["trainable"] == 147_456
    assert plain["memory"]["ratio"] == shown.memory.ratio
    assert plain["patterns"] == [
        {"pattern": "c_attn", "adapter": "default", "layers": 12, "ranks": [4],
         "parameters": 147_456, "weight": 1.0},
    ]  # fmt: skip


@PEFT_WARNS
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_agree_with_peft(family):
    targets = list(FAMILIES[family].targets)
    shown = inject(FAMILIES[family].build(), targets, r=3)
    wrapped = peft.get_peft_model(
        FAMILIES[family].build(), peft.LoraConfig(target_modules=targets, r=3)
    )
    assert (shown.trainable, shown.total) == wrapped.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("nadam", torch.optim.NAdam),
        ("radam", torch.optim.RAdam), ("adamax", torch.optim.Adamax),
        ("rmsprop", torch.optim.RMSprop), ("adagrad", torch.optim.Adagrad),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("sgd-momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [None, "base"])
def test_memory_is_what_the_optimizer_holds(name, make, dtype):
    model = Net(dtype=torch.bfloat16)
    inject(model, ["q_proj", "embed"], r=2, dtype=dtype, bias="all")
    optimizer = make(lora_parameters(model))
    model(ids()).float().sum().backward()
    optimizer.step()
    held = report(model, optimizer=name).memory.trainable
    states = [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor) and t.dim() > 0
    ]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for part, tensors in (
        (held.optimizer, states),
        (held.gradients, gradients),
        (held.weights, [p for p in model.parameters() if p.requires_grad]),
    ):
        by_dtype = {}
        for t in tensors:
            key = str(t.dtype).removeprefix("torch.")
            by_dtype[key] = by_dtype.get(key, 0) + t.numel() * t.element_size()
        assert {k: n for k, n in part.items() if n} == by_dtype
    assert name in OPTIMIZER_STATES


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ArgumentError, match=r"optimizer.*adamw.*'adamwx'"):
        report(Net(), optimizer="adamwx")


def test_each_parameter_is_counted_once():
    model = Net()
    model.alias = model.layers
    model.tied = nn.Linear(8, 11, bias=False)
    model.tied.weight = model.embed.weight
    assert report(model).total == sum({id(p): p.numel() for p in model.parameters()}.values())


def test_the_split_adds_up():
    model = Net()
    inject(model, ["q_proj"], bias="all", train_also="head")
    model.layers[0].norm.weight.requires_grad_(True)
    shown = report(model)
    assert sum(shown.split.values()) == shown.trainable
    assert shown.split["other"] == 8
    assert shown.split["train_also"] == 27
    assert shown.split["bias"] == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("bias") and "head" not in n
    )


def test_rows_per_pattern():
    model = Net()
    shown = inject(model, {"q_proj": {"r": 2}, "layers.*.[kv]_proj": {"r": 3}, "embed": {}}, r=5)
    rows = {row.pattern: row for row in shown.patterns}
    assert {name: (row.layers, row.ranks) for name, row in rows.items()} == {
        "q_proj": (2, (2,)), "layers.*.[kv]_proj": (4, (3,)), "embed": (1, (5,)),
    }  # fmt: skip
    assert sum(row.parameters for row in shown.patterns) == shown.trainable


def test_packed_weights_count_by_their_logical_shape():
    class QuantState:
        shape, dtype = torch.Size([64, 32]), torch.bfloat16

    layer = nn.Linear(32, 64, bias=False)
    layer.weight = nn.Parameter(torch.zeros(64 * 32 // 2, 1, dtype=torch.uint8), False)
    layer.weight.quant_state = QuantState()
    shown = report(layer)
    assert shown.total == 64 * 32
    assert shown.memory.frozen.weights == {"uint8": 64 * 32 // 2}
    assert shown.memory.full.total == 64 * 32 * 2 * 4


def test_models_without_parameters_and_without_adapters():
    empty = report(nn.ReLU())
    assert (empty.total, empty.percent, empty.patterns) == (0, 0.0, ())
    assert "No parameter trains" in str(empty)
    bare = report(Net())
    assert bare.trainable == bare.total
    assert bare.bias is None
    assert bare.memory.ratio == 1.0


def test_reports_show_in_a_terminal_without_unicode(monkeypatch):
    class Ascii:
        encoding = "ascii"

    shown = plan(Net(), "q_proj")
    monkeypatch.setattr("sys.stdout", Ascii())
    assert str(shown).isascii()


def test_the_plan_as_it_prints():
    text = str(plan(Net(), ["q_proj", "*"], r=2, exclude="embed", train_also="norm"))
    for part in (
        "layers.{0..1}.q_proj", "8 x 8", "q_proj", "Train in full", "layers.0.norm", "Skipped",
        "LayerNorm", "excluded by 'embed'",
    ):  # fmt: skip
        assert part in text


def test_what_came_into_the_model_since_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert not inject(model, "0", r=1, bias="all").notes
    model.append(nn.Linear(4, 2))
    model[1].register_parameter("extra", nn.Parameter(torch.ones(3)))
    (note,) = report(model).notes
    assert note.startswith("3 parameters that came into the model since inject train too")
    assert not freeze(model, bias="all").notes


def test_one_line_for_logs(gpt2_small):
    _, shown = gpt2_small
    line = "GPT2LMHeadModel: 147,456 of 124,587,264 parameters train (0.1184 %)"
    assert shown.line == line
    assert str(shown).startswith(line)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert report(frozen).line == "Linear: 0 of 6 parameters train (0.0000 %)"


def test_notes_stand_apart_under_their_own_title():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    text = str(inject(model, "0", r=2))
    table, notes = text.split("\n\nNotes\n\n")
    assert table.endswith("times.")
    told = " ".join(notes.split())
    assert told.startswith("The running statistics of 1 normalisation layer stand still")
