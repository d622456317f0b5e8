"""How often a call walks the whole model, counted at the root, through which every walk goes."""

import pytest
from helpers import Net, ids
from torch import nn

from lora_inject import (
    audit,
    combine,
    disabled,
    freeze,
    inject,
    load,
    lora_parameters,
    lora_state_dict,
    merge,
    param_groups,
    per_row,
    plan,
    remove,
    report,
    reset_lora_parameters,
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
    assert walks(children, lambda: plan(model, TARGETS, r=2)) == 1
    assert walks(children, lambda: inject(model, TARGETS, r=2)) == 2
    again = {"adapter": "b", "bias": "all", "train_also": ["head"]}
    assert walks(children, lambda: inject(model, ["q_proj"], r=2, **again)) == 2


CALLS = {
    "audit": audit,
    "report": report,
    "lora_parameters": lora_parameters,
    "param_groups": lambda model: param_groups(model, lr=0.1),
    "use": lambda model: use(model, "default"),
    "use one with biases": lambda model: use(model, "b"),
    "lora_state_dict": lambda model: lora_state_dict(model, adapter="b"),
    "combine": lambda model: combine(model, {"default": 1.0}, "c"),
    "reset": reset_lora_parameters,
    "remove": lambda model: remove(model, "b"),
    "strip": strip,
    "strip and merge": lambda model: strip(model, merge=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_calls(call):
    model, children = adapted()
    assert walks(children, lambda: call(model)) == 1


def test_calls_that_come_in_pairs():
    model, children = adapted()
    use(model, "default")
    assert walks(children, lambda: freeze(model)) == 1
    assert walks(children, lambda: merge(model)) == 1
    assert walks(children, lambda: unmerge(model)) == 1

    def block(manager):
        with manager:
            pass

    use(model, "b")
    assert walks(children, lambda: block(disabled(model))) == 1
    assert walks(children, lambda: block(per_row(model, ["default", None]))) == 1


def test_files(tmp_path):
    model, children = adapted()
    assert walks(children, lambda: save(model, tmp_path / "a", adapter="default")) == 1
    assert walks(children, lambda: load(model, tmp_path / "a", adapter="default")) == 1
    assert walks(children, lambda: load(model, tmp_path / "a", adapter="c")) <= 2
    model(ids())
