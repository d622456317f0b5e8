"""Under DistributedDataParallel nothing begins to train that it does not reduce."""

import copy
import warnings

import pytest
import torch
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lora_inject import (
    LoRAInjectError,
    LoRAInjectWarning,
    combine,
    freeze,
    inject,
    report,
    strip,
    use,
)

pytestmark = [pytest.mark.distributed, pytest.mark.cpu("the ranks are processes there")]
REFUSED = "DistributedDataParallel has wrapped the model and would not reduce"


def two():
    model = Net()
    inject(model, ["q_proj"], r=2)
    inject(model, ["v_proj"], r=2, adapter="b")
    return use(model, "default")


def combined_in_use(model):
    use(combine(model, {"default": 1.0}, "c") and model, "c")


CALLS = {
    "use": lambda model: use(model, "b"),
    "train": lambda model: use(model, "default", train=["default", "b"]),
    "freeze": lambda model: freeze(model, bias="all"),
    "inject": lambda model: inject(model, ["head"], r=2, adapter="c"),
    "combine": combined_in_use,
}


def refuses(call, inner):
    model = two()
    ddp = DistributedDataParallel(model)
    before = snapshot(model)
    with pytest.raises(LoRAInjectError, match="DistributedDataParallel"):
        CALLS[call](model if inner else ddp)
    if call != "combine":
        assert before == snapshot(model)
    with pytest.raises(LoRAInjectError, match=REFUSED):  # and a part of the model
        use(model.layers[0], "b")


def remedies():
    model = two()
    ddp = DistributedDataParallel(model)
    ddp = ddp.module
    use(ddp, "b")
    model = use(two(), "default", train=["default", "b"])
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for name in ("b", "default"):
        use(ddp, name, train=["default", "b"])
        ddp(ids()).sum().backward()
    use(ddp)
    use(ddp, "b")
    strip(ddp)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_what_would_not_be_reduced_is_refused(call, inner):
    on_ranks(1, refuses, call, inner)


def test_the_remedies_work_and_what_is_reduced_may_come_and_go():
    on_ranks(1, remedies)


def test_adapters_that_get_no_gradient_are_named():
    model = nn.Sequential(Net(), nn.ModuleDict({"spare": nn.Linear(3, 3)}))
    inject(model, ["q_proj", "spare"], r=2)
    randomize_adapters(model)
    assert not report(model).notes
    model[0](ids()).sum().backward()
    (note,) = report(model).notes
    assert note.startswith("1.spare: no gradient reached its adapter")


class Spare(nn.Module):
    """Has a layer that its forward does not use."""

    def __init__(self):
        super().__init__()
        self.net, self.spare = Net(), nn.Linear(3, 3)

    def forward(self, ids):
        return {"logits": self.net(ids)}


NAMED = "^spare: no gradient reaches its adapter .* will fail in the next step"


def step(ddp):
    ddp(ids())["logits"].sum().backward()


def names_before_ddp_fails():
    model = Spare()
    before = snapshot(model)
    inject(model, ["q_proj", "spare"], r=2)
    ddp = DistributedDataParallel(model)
    with torch.no_grad():
        ddp(ids())
    model(ids())  # not through the wrapper
    with pytest.warns(LoRAInjectWarning, match=NAMED):
        step(ddp)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        step(ddp)
    del ddp
    strip(model)
    assert changed_parts(before, snapshot(model)) == []


def says_nothing_where_all_is_well():
    warnings.filterwarnings("error", ".*no gradient", LoRAInjectWarning)
    for targets, options in (
        (["q_proj"], {}),
        (["q_proj", "spare"], {"find_unused_parameters": True}),
        (["q_proj", "spare"], {"static_graph": True}),
    ):
        model = Spare()
        inject(model, targets, r=2)
        ddp = DistributedDataParallel(model, **options)
        for _ in range(3):
            step(ddp)
        copy.deepcopy(model)(ids())


class Closed(Spare):
    """Runs all of it in a part that is checkpointed in the reentrant form."""

    def forward(self, ids):
        x = self.net.embed(ids).requires_grad_()
        return checkpoint(lambda x: self.net.head(self.net.layers[0](x)), x, use_reentrant=True)


def says_nothing_where_it_cannot_tell():
    warnings.filterwarnings("error", ".*no gradient", LoRAInjectWarning)
    model = Closed()
    inject(model, ["layers.0.q_proj"], r=2)
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        ddp(ids()).sum().backward()


@pytest.mark.parametrize(
    "function",
    [names_before_ddp_fails, says_nothing_where_all_is_well, says_nothing_where_it_cannot_tell],
)
def test_adapters_that_never_get_a_gradient_are_named_before_ddp_fails(function):
    on_ranks(1, function)


def test_a_program_of_one_process_has_no_hook_for_it():
    model = Net()
    inject(model, ["q_proj"], r=2)
    assert not model._forward_hooks
