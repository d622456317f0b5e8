"""The target grammar: what each form selects, and what it says when it selects nothing."""

import fnmatch
import re
import time

import pytest
import regex
from helpers import Net, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_inject import ArgumentError, LoRAInjectError, NoMatchError, inject, plan
from lora_inject.core.index import Index
from lora_inject.core.patterns import braces, parse

pytestmark = pytest.mark.cpu("nothing is computed")

component = st.text("abq_01", min_size=1, max_size=4)
path = st.lists(component, min_size=1, max_size=5).map(".".join)


def paths(model, targets, **arguments):
    return [site.path for site in plan(model, targets, r=2, **arguments).sites]


def tree(*names):
    """A model with a Linear at each path."""
    root = nn.Module()
    for name in names:
        *parents, leaf = name.split(".")
        at = root
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at._modules[parent]
        at.add_module(leaf, nn.Linear(4, 4))
    return root


def test_a_name_matches_whole_components_from_the_right():
    model = tree("a.q_proj", "a.xq_proj", "vision.q_proj", "q_proj.out")
    assert paths(model, "q_proj") == ["a.q_proj", "vision.q_proj"]
    assert paths(model, "a.q_proj") == ["a.q_proj"]
    assert paths(model, "vision.q_proj") == ["vision.q_proj"]
    assert paths(tree("X.Xq", "a.X"), ["X", "Xq"]) == ["X.Xq", "a.X"]


@given(path, path)
def test_a_name_matches_exactly_the_component_suffixes(name, pattern):
    (selector,) = parse(pattern, "targets")
    parts, wanted = name.split("."), pattern.split(".")
    assert selector.test(name, nn.Identity()) == (parts[-len(wanted) :] == wanted)


@given(path, st.text("abq_.*?", min_size=1, max_size=6).filter(lambda t: "*" in t or "?" in t))
def test_a_glob_is_matched_against_the_whole_path(name, pattern):
    (selector,) = parse(pattern, "targets")
    assert selector.test(name, nn.Identity()) == fnmatch.fnmatchcase(name, pattern)


def test_globs_and_regular_expressions():
    model = Net()
    assert paths(model, "layers.*.q_proj") == ["layers.0.q_proj", "layers.1.q_proj"]
    assert paths(model, "*[qk]_proj") == [f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qk"]
    assert paths(model, r"re:layers\.\d+\.(q|v)_proj") == [
        f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qv"
    ]
    with pytest.raises(NoMatchError, match="q_proj"):  # a full match, not a search
        plan(model, "re:q_proj")


def test_classes_and_callables():
    model = Net()
    assert paths(model, nn.Embedding) == ["embed"]
    assert len(paths(model, nn.Linear)) == 9
    assert paths(model, lambda path, module: getattr(module, "out_features", 0) == 3) == ["head"]
    assert paths(model, [nn.Embedding, "head"]) == ["embed", "head"]


def test_all_linear_leaves_the_head():
    model = Net()
    assert "head" not in paths(model, "all-linear")
    assert len(paths(model, "all-linear")) == 8
    (skip,) = plan(model, "all-linear").skipped
    assert (skip.path, skip.reason) == ("head", "output head (by its name)")
    assert "head" in paths(model, ["all-linear", "head"])
    assert not plan(model, ["all-linear", "head"]).skipped
    assert paths(model, "*", exclude="all-linear") == ["embed"]
    with pytest.raises(NoMatchError, match="train_also: 'all-linear' matches nothing"):
        plan(model, "head", train_also="all-linear")


def test_all_linear_knows_a_tied_head():
    model = Net()
    model.project = nn.Linear(8, 11, bias=False)
    model.project.weight = model.embed.weight
    assert "project" not in paths(model, "all-linear")


def test_a_mapping_gives_each_pattern_its_settings():
    chosen = plan(
        Net(),
        {
            "layers.0.q_proj": {"r": 2, "alpha": 3},
            "q_proj": {"r": 5},
            nn.Embedding: {"dropout": 0.5},
            "head": {},
            lambda path, module: path.endswith("1.o_proj"): {"r": 6},
        },
        r=7,
    )
    settings = {site.path: site.settings for site in chosen.sites}
    assert (settings["layers.0.q_proj"].r, settings["layers.0.q_proj"].alpha) == (2, 3.0)
    assert (settings["layers.1.q_proj"].r, settings["layers.1.q_proj"].alpha) == (5, 5.0)
    assert (settings["embed"].r, settings["embed"].dropout) == (7, 0.5)
    assert settings["head"].scaling == 1.0
    assert settings["layers.1.o_proj"].r == 6
    with pytest.raises(NoMatchError, match="put it first"):
        plan(Net(), {"q_proj": {"r": 5}, "layers.0.q_proj": {"r": 2}})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"q_proj": {"r": 0}}, "r in targets\\['q_proj'\\]"),
        ({"q_proj": {"rank": 4}}, "rank"),
        ({"q_proj": 4}, "targets\\['q_proj'\\]"),
    ],
)
def test_a_mapping_with_bad_settings(value, named):
    with pytest.raises(ArgumentError, match=named):
        plan(Net(), value)


def test_exclude_takes_whole_subtrees_and_the_same_grammar():
    assert paths(Net(), "q_proj", exclude="layers.0") == ["layers.1.q_proj"]
    assert paths(Net(), "q_proj", exclude=["*.1.*"]) == ["layers.0.q_proj"]
    assert paths(Net(), nn.Linear, exclude=[r"re:layers\..*"]) == ["head"]
    with pytest.raises(NoMatchError, match="'class Linear' chooses nothing"):
        plan(Net(), [nn.Linear, nn.Embedding], exclude=nn.Linear)
    with pytest.raises(NoMatchError, match=r"exclude: 'layers\.7' matches nothing"):
        plan(Net(), "q_proj", exclude="layers.7")
    with pytest.raises(NoMatchError, match="excluded by 'layers'"):
        plan(Net(), "q_proj", exclude="layers")
    for argument in ("exclude", "train_also"):
        with pytest.raises(ArgumentError, match=f"^{argument} takes patterns without settings"):
            plan(Net(), "q_proj", **{argument: {"q_proj": {"r": 2}}})


def test_layers_keeps_blocks():
    assert paths(Net(), "q_proj", layers=1) == ["layers.1.q_proj"]
    assert paths(Net(), "q_proj", layers=[-1]) == ["layers.1.q_proj"]
    assert paths(Net(), "q_proj", layers=range(2)) == ["layers.0.q_proj", "layers.1.q_proj"]
    with pytest.raises(ArgumentError, match=r"layers=\[2\].*\{0\.\.1\}"):
        plan(Net(), "q_proj", layers=[0, 2])
    with pytest.raises(ArgumentError, match=r"layers=\[0\] .*: no target lies in a block"):
        plan(Net(), "head", layers=0)
    with pytest.raises(NoMatchError, match=r"'head' chooses nothing.*not in layers="):
        plan(Net(), ["q_proj", "head"], layers=0)


@pytest.mark.parametrize("layers", [[], "0", 1.5, [True], [0, "a"]])
def test_bad_layers(layers):
    with pytest.raises(ArgumentError, match="layers"):
        plan(Net(), "q_proj", layers=layers)


def test_every_pattern_that_matches_nothing_is_named_with_close_names():
    model = Net()
    before = snapshot(model)
    with pytest.raises(NoMatchError) as caught:
        inject(model, ["q_proj", "v_porj", "dense"], r=4)
    message = str(caught.value)
    assert "'v_porj' matches nothing. Close names: v_proj" in message
    assert "'dense' matches nothing" in message
    assert "'q_proj'" not in message
    assert "Names that can be adapted: embed, head, k_proj, o_proj, q_proj, v_proj" in message
    assert snapshot(model) == before


def test_a_container_is_refused_with_its_children():
    with pytest.raises(NoMatchError) as caught:
        plan(Net(), "layers.0")
    message = str(caught.value)
    assert "type Block" in message
    assert "layers.0.q_proj" in message
    with pytest.raises(NoMatchError, match="LayerNorm"):
        plan(Net(), ["norm"])


def test_a_parameter_is_told_from_a_layer():
    model = Net()
    model.experts = nn.Module()
    model.experts.up_proj = nn.Parameter(nn.Linear(4, 8).weight.detach())
    model.shared = nn.Module()
    model.shared.up_proj = nn.Linear(8, 8)
    assert paths(model, "up_proj") == ["experts.up_proj", "shared.up_proj"]
    assert paths(model, "experts.up_proj") == ["experts.up_proj"]
    # Written for layers, a glob must not catch every matrix on the way.
    assert paths(model, "*.up_proj") == ["shared.up_proj"]
    assert paths(model, "experts.*") == ["experts.up_proj"]
    assert paths(model, nn.Linear, exclude="layers")[-1] == "shared.up_proj"
    for argument in ("exclude", "train_also"):
        with pytest.raises(NoMatchError, match=f"{argument}: 'experts.up_proj' matches no"):
            plan(model, "q_proj", **{argument: "experts.up_proj"})


def test_a_regular_expression_is_stopped():
    model = tree("a" * 60 + "!")
    started = time.perf_counter()
    with pytest.raises(ArgumentError, match="takes longer"):
        plan(model, r"re:(a|aa|aaa)+$")
    assert time.perf_counter() - started < 60  # without the limit: longer than anybody would wait
    with pytest.raises(ArgumentError, match="not a regular expression"):
        plan(model, "re:(")
    with pytest.raises(ArgumentError, match="characters"):
        plan(model, "re:" + "a" * 3000)


@pytest.mark.parametrize(
    "targets",
    [None, [], (), "", " ", ["q_proj", ""], 3, [None], int, nn.Linear(2, 2), {}, b"q",
     regex.compile("q")],
)  # fmt: skip
def test_targets_that_are_no_patterns(targets):
    model = Net()
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"^targets"):
        inject(model, targets)
    assert snapshot(model) == before


def test_an_exception_in_a_callable_leaves_the_model_alone():
    model = Net()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        inject(model, lambda path, module: 1 / 0)
    assert snapshot(model) == before


def test_a_shared_module_is_one_place_with_all_its_names():
    model = Net()
    model.alias = model.layers[1].q_proj
    (place,) = [p for p in Index(model).named if "alias" in p.paths]
    assert place.paths == ("layers.1.q_proj", "alias")
    assert paths(model, "alias") == ["layers.1.q_proj"]
    assert paths(model, ["alias", "q_proj"]) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_the_model_itself_can_be_the_layer():
    layer = nn.Linear(4, 4)
    assert [site.path for site in plan(layer, nn.Linear).sites] == [""]
    with pytest.raises(LoRAInjectError, match="matches nothing"):
        plan(layer, "q_proj")


@given(st.sets(st.integers(0, 30), min_size=1))
def test_braces_name_exactly_the_numbers(numbers):
    written = braces(numbers)
    read = set()
    for part in written.strip("{}").split(","):
        first, _, last = part.partition("..")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == numbers


def test_the_flags_of_a_compiled_expression_count():
    model = tree("é", "a", "b\nc")
    assert paths(model, re.compile(r"\w")) == ["é", "a"]
    assert paths(model, re.compile(r"\w", re.A)) == ["a"]
    assert paths(model, re.compile("b.c", re.S)) == ["b\nc"]
    assert paths(model, re.compile("b$\nc", re.M)) == ["b\nc"]


def test_blocks_lie_anywhere_in_a_model():
    model = nn.ModuleDict({"net": nn.ModuleDict({"body": Net()})})
    assert paths(model, "q_proj", layers=-1) == ["net.body.layers.1.q_proj"]


def test_one_number_stands_alone_in_braces():
    assert braces({5}) == "{5}"
    assert braces({5, 6, 8}) == "{5..6,8}"


def test_of_a_list_the_first_pattern_that_selects_a_layer_decides_and_a_set_has_one_order():
    assert {site.pattern for site in plan(Net(), ["q_proj", "*_proj"]).sites[:1]} == {"q_proj"}
    assert {site.pattern for site in plan(Net(), ["*_proj", "embed"]).sites[1:]} == {"*_proj"}
    several = {"q_proj", "*_proj", "embed"}
    assert [pattern.label for pattern in parse(several, "targets")] == sorted(several)


def test_a_compiled_expression_is_one():
    assert paths(Net(), re.compile(r"layers\.0\.q_proj")) == paths(Net(), r"re:layers\.0\.q_proj")
    assert paths(Net(), re.compile(r"LAYERS\.0\.Q_PROJ  # all", re.I | re.X)) == ["layers.0.q_proj"]
    assert paths(Net(), nn.Linear, exclude=re.compile(r"layers\..*")) == ["head"]
    assert plan(Net(), {re.compile(r".*q_proj"): {"r": 3}}).sites[0].settings.r == 3
    with pytest.raises(NoMatchError, match=r"re:q_proj"):
        plan(Net(), re.compile("q_proj"))  # the whole path, as always
    with pytest.raises(ArgumentError, match="not a pattern"):
        plan(Net(), re.compile(b"q_proj"))


def test_patterns_of_any_sort_stand_in_a_set_and_keywords_have_settings():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1)})
    assert len(plan(model, {"fc", nn.Conv1d}, r=1).sites) == 2
    assert [site.settings.r for site in plan(model, {"all-linear": {"r": 3}}).sites] == [3]


def test_a_name_beside_the_blocks_is_no_block():
    model = nn.ModuleDict({"0": nn.Linear(4, 4), "1": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    assert [site.path for site in plan(model, nn.Linear, r=1, layers=-2).sites] == ["0"]
