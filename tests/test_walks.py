"""How often a call walks the whole model, counted at the root, through which every walk goes."""

import pytest
from helpers import Net, ids
from torch import nn

from lora_inject import (
    disabled,
    freeze,
    inject,
    load,
    lora_parameters,
    lora_state_dict,
    merge,
    per_row,
    plan,
    remove,
    report,
    save,
    strip,
    unmerge,
    use,
)

TARGETS = ["q_proj", "v_proj"]


class Children(dict):
    """The root's submodules, counting whoever goes through all of them."""

    seen = 0

    def items(self):
        self.seen += 1
        return super().items()

    def values(self):
        self.seen += 1
        return super().values()

    def __iter__(self):
        self.seen += 1
        return super().__iter__()


def counted():
    model = nn.Sequential(Net(), nn.Linear(3, 3))
    children = model.__dict__["_modules"] = Children(model._modules)
    return model, children


def adapted():
    model, children = counted()
    inject(model, TARGETS, r=2)
    inject(model, ["q_proj"], r=2, adapter="b", bias="all", train_also=["head"])
    return model, children


def walks(children, action):
    before = children.seen
    action()
    return children.seen - before


def test_inject_and_plan():
    model, children = counted()
    assert walks(children, lambda: plan(model, TARGETS, r=2)) <= 8
    assert walks(children, lambda: inject(model, TARGETS, r=2)) <= 24
    again = {"adapter": "b", "bias": "all", "train_also": ["head"]}
    assert walks(children, lambda: inject(model, ["q_proj"], r=2, **again)) <= 31


@pytest.mark.parametrize(
    ("most", "call"),
    [
        (10, report),
        (1, lora_parameters),
        (2, lambda model: use(model, "default")),
        (2, lambda model: use(model, "b")),
        (5, lambda model: lora_state_dict(model, adapter="b")),
        (3, lambda model: remove(model, "b")),
        (3, strip),
    ],
    ids=["report", "lora_parameters", "use", "use b", "lora_state_dict", "remove", "strip"],
)
def test_other_calls(most, call):
    model, children = adapted()
    assert walks(children, lambda: call(model)) <= most


def test_calls_that_come_in_pairs():
    model, children = adapted()
    use(model, "default")
    assert walks(children, lambda: freeze(model)) <= 22
    assert walks(children, lambda: merge(model)) <= 5
    assert walks(children, lambda: unmerge(model)) <= 3

    def block(manager):
        with manager:
            pass

    assert walks(children, lambda: block(disabled(model))) <= 4
    assert walks(children, lambda: block(per_row(model, ["default", None]))) <= 3


def test_files(tmp_path):
    model, children = adapted()
    assert walks(children, lambda: save(model, tmp_path / "a", adapter="default")) <= 5
    assert walks(children, lambda: load(model, tmp_path / "a", adapter="default")) <= 9
    assert walks(children, lambda: load(model, tmp_path / "a", adapter="c")) <= 45
    model(ids())
