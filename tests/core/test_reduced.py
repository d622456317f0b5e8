"""Under DistributedDataParallel nothing begins to train that it does not reduce."""

import pytest
from helpers import Net, ids, randomize_adapters, snapshot
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lora_inject import LoRAInjectError, combine, freeze, inject, report, strip, use

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
