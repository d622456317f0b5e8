"""What patterns select in a model, and what is said of one that selects nothing."""

import pytest
import torch
from torch import nn

from lora_inject import NoMatchError, UnsupportedLayerError, inject, plan, use
from lora_inject.printing import few

pytestmark = pytest.mark.cpu("nothing is computed")


def model():
    """Two layers, a matrix of its own, and nothing that a container could train."""
    own = nn.ModuleDict({"fc": nn.Linear(4, 4), "head": nn.Linear(4, 2), "act": nn.ReLU()})
    own.register_parameter("mixing", nn.Parameter(torch.randn(4, 4)))
    return own


def said(targets, own=None, **arguments):
    with pytest.raises(NoMatchError) as caught:
        plan(own or model(), targets, r=1, **arguments)
    return str(caught.value)


def fc(path, module):
    """A test that selects nothing, with a name like a layer's."""
    return False


def test_a_test_is_asked_about_modules_of_the_model_alone():
    asked, own = [], model()

    def never(path, module):
        asked.append((path, module))
        return False

    for arguments in ({"targets": never}, {"targets": "fc", "exclude": never}):
        with pytest.raises(NoMatchError, match="matches nothing"):
            plan(own, r=1, **arguments)
    assert {(path, id(module)) for path, module in asked} == {
        (path, id(module)) for path, module in own.named_modules()
    }


def test_only_what_is_a_name_has_close_names_and_only_an_expression_is_called_one():
    assert said(fc).startswith("targets: 'fc()' matches nothing.")
    for targets in (fc, nn.GRU, "re:(fc|head)$x"):
        assert "Close names" not in said(targets)
        assert "expression" not in said(targets)
    assert 'begins with "re:" and matches whole paths: "re:.*(fc|haed)"' in said("fc|haed")
    assert '"re:.*fc$"' in said(".*fc$")
    assert "Close names: head" in said("haed")
    assert "expression" not in said("haed")


def test_close_names_have_as_many_components_as_the_name_and_are_four_at_most():
    own = nn.ModuleDict({"net": nn.ModuleDict({"trunk": model()})})
    assert "Close names: trunk.head, trunk." in said("trunk.haed", own=own)
    own = nn.ModuleDict({f"head{i}": nn.Linear(4, 4) for i in range(5)})
    assert "Close names: head4, head3, head2, head1. Names" in said("head", own=own)


def test_a_part_without_floating_point_parameters_cannot_train():
    own = model()
    own["norm"], own["ids"] = nn.LayerNorm(4, elementwise_affine=False), nn.Module()
    own["ids"].register_parameter("ids", nn.Parameter(torch.arange(3), requires_grad=False))
    for part in ("norm", "ids", "act"):
        with pytest.raises(NoMatchError, match=f"^{part}: train_also: '{part}' selects no module"):
            plan(own, "fc", r=1, train_also=part)
    assert list(plan(own, "fc", r=1, train_also="[hni]*").train_also) == ["head"]


def test_a_container_names_the_matrices_that_it_holds_and_that_can_be_adapted():
    own = nn.ModuleDict({"inner": nn.Module(), "other": nn.Module(), "fc": nn.Linear(4, 4)})
    for name, shape in (("kernels", (2, 2, 2, 2)), ("stacked", (2, 4, 4)), ("mixing", (4, 4))):
        for part in ("inner", "other"):
            own[part].register_parameter(name, nn.Parameter(torch.randn(shape)))
    with pytest.raises(NoMatchError, match=r"such as inner\.stacked, inner\.mixing\.$"):
        plan(own, "inner", r=1)


@pytest.mark.parametrize("argument", ["exclude", "train_also"])
def test_what_is_said_of_a_part_that_is_not_there(argument):
    """The parts where nothing is like it; else the close names, or that it is a parameter."""
    parts, parameter = "There are head, fc.", "It names a parameter; name the module that owns it."
    text = said("fc", **{argument: "nowhere"})
    assert text.startswith(f"{argument}: 'nowhere' matches nothing.")
    assert parts in text
    assert said("fc", **{argument: "haed"}).endswith("Close names: head.")
    for pattern in ("mixing", "*ix*"):
        text = said("fc", **{argument: pattern})
        assert parameter in text
        assert parts not in text


def test_names_are_listed_up_to_a_number():
    names = [f"n{i}" for i in range(21)]
    assert few(names[:20], 20) == ", ".join(names[:20])
    assert few(names, 20) == ", ".join(names[:20]) + " and 1 more"
    assert few(names[:3], 2) == "n0, n1 and 1 more"
    with pytest.raises(NoMatchError, match="Names that can be adapted: none"):
        inject(nn.Sequential(nn.ReLU()), "fc")
    own = nn.ModuleDict({f"n{i:02}": nn.Linear(4, 4) for i in range(21)})
    with pytest.raises(NoMatchError, match=r": n00, .*, n19 and 1 more\.$"):
        plan(own, "fc", r=1)
    with pytest.raises(NoMatchError, match=r"There are n00, .*, n07 and 13 more\.$"):
        plan(own, "n00", r=1, exclude="nowhere")


def test_a_parameter_is_told_by_its_path_and_shape_and_a_layer_by_its_class():
    own = model()
    own["X"] = model()
    shown = plan(own, ["mixing", "fc"], r=1)
    assert {(site.path, site.type) for site in shown.sites} == {
        ("mixing", "Parameter (4, 4)"),
        ("X.mixing", "Parameter (4, 4)"),
        ("fc", "Linear"),
        ("X.fc", "Linear"),
    }


def test_only_the_parts_of_a_model_are_named_and_not_what_is_in_them():
    own = nn.ModuleDict({"trunk": nn.ModuleDict({"inner": nn.Linear(4, 4)}), "fc": nn.Linear(4, 4)})
    with pytest.raises(NoMatchError, match=r"There are trunk, fc\.$"):
        plan(own, "fc", r=1, exclude="nowhere")


def test_the_matrix_of_a_layer_that_trains_in_full_is_named_and_refused_as_the_layer_is():
    own = model()
    inject(own, "fc", r=1, train_also="head")
    use(own)  # the base's own weight stands in its place
    for name in ("head", "head.weight"):
        with pytest.raises(UnsupportedLayerError, match="'default' trains it in full"):
            plan(own, name, r=1, adapter="b")
