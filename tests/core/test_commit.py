"""A call that fails or is interrupted, at whatever step, has changed nothing."""

import random
import signal
import sys
import threading
import warnings

import pytest
import torch
from helpers import Faults, changed_parts, snapshot
from torch import nn

from lora_inject import (
    combine,
    disabled,
    freeze,
    inject,
    load,
    lora_parameters,
    merge,
    merged,
    per_row,
    remove,
    reset_lora_parameters,
    save,
    strip,
    unmerge,
    use,
)
from lora_inject.changes import edits
from lora_inject.core.lend import lend, take_back
from lora_inject.core.state import state_of
from lora_inject.core.tensor_marks import mark_of

pytestmark = pytest.mark.cpu("it is about steps, not values")

ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)


class Stateless(nn.Module):
    """A block that can be checkpointed."""

    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False
        self.lin, self.k = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.k(torch.tanh(self.lin(x)))


class Net(nn.Module):
    """What needs edits of every sort: lists of weights, ties, shared layers, statistics, hooks."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight
        self.lstm = nn.LSTM(3, 3)
        self.block = Stateless()
        self.again = nn.ModuleList([self.block.lin])
        self.head = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))

    def forward(self, ids):
        return self.out(self.head(self.again[0](self.block(self.lstm(self.embed(ids))[0]))))


def plain():
    torch.manual_seed(0)
    model = Net()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.lstm.bias_hh_l0.requires_grad_(False)
    model.head[0].eval()
    return model


def adapted():
    """Two adapters, of which the one in use trains biases, statistics and a tied tensor."""
    model = plain()
    inject(model, ["lin", "lstm"], r=1, adapter="a", bias="lora_only")
    use(model)
    inject(model, ["k"], r=1, adapter="b", bias="all", train_also=["head", "embed"])
    _randomize(model)
    return model


def plainly():
    """Two adapters, both in use, that own nothing in place."""
    model = plain()
    inject(model, ["lin", "k"], r=1, adapter="a")
    inject(model, ["lin", "block.k"], r=1, adapter="b")
    _randomize(model)
    return model


def tied():
    model = plain()
    inject(model, ["embed", "k"], r=1, adapter="a")
    return model


def _randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
                parameter.add_(torch.rand_like(parameter))


def saved():
    model = plain()
    inject(model, ["k"], r=1, bias="all", train_also=["head"])
    _randomize(model)
    return model


def folded():
    model = plainly()
    merge(model, "a", keep="cpu")
    return model


def exact(model):
    """The snapshot, and the very states of modules and marks of tensors."""
    modules = dict(model.named_modules())
    marks = {
        (path, name): mark_of(p)
        for path, m in modules.items()
        for name, p in m._parameters.items()
        if p is not None
    }
    hidden = {path: sorted(m._non_persistent_buffers_set) for path, m in modules.items()}
    lists = [id(w) for w in vars(model.lstm)["_flat_weights"]]
    own = {path: state_of(m) for path, m in modules.items()}
    return {**snapshot(model), "marks": marks, "hidden": hidden, "lists": lists, "states": own}


def entered(block):
    block.__enter__()
    return block


OPERATIONS = {
    "inject": (plain, lambda m, _: inject(m, ["lin", "lstm", "embed"], r=1)),
    "inject with all that trains": (
        plain,
        lambda m, _: inject(m, ["lin", "lstm"], r=1, bias="all", train_also=["head", "embed"]),
    ),
    "inject into a part": (plainly, lambda m, _: inject(m.block, "k", r=1, adapter="c")),
    "inject one more": (
        adapted,
        lambda m, _: inject(m, ["lin", "lstm"], r=1, adapter="c"),
    ),
    "inject around a part": (
        lambda: inject(model := plain(), ["lin"], r=1) and model,
        lambda m, _: inject(m, ["k", "embed"], r=1, bias="all", adapter="c"),
    ),
    "load": (plain, lambda m, file: load(m, file, adapter="new")),
    "load beside others": (adapted, lambda m, file: load(m, file, adapter="new")),
    "load into one": (
        lambda: _randomize(model := saved()) or model,
        lambda m, file: load(m, file),
    ),
    "use another": (adapted, lambda m, _: use(m, "a")),
    "use none": (adapted, lambda m, _: use(m)),
    "use none of a part": (plainly, lambda m, _: use(m.block)),
    "use weighted": (plainly, lambda m, _: use(m, {"a": 0.5, "b": -1.0}, train=["a"])),
    "freeze": (adapted, lambda m, _: freeze(m)),
    "freeze with more": (tied, lambda m, _: freeze(m, "all", ["head"])),
    "freeze what is not adapted": (plain, lambda m, _: freeze(m, "all", ["head"])),
    "merge": (plainly, lambda m, _: merge(m)),
    "merge, kept on the CPU": (plainly, lambda m, _: merge(m, "b", keep="cpu")),
    "merge for good": (plainly, lambda m, _: merge(m, keep=False)),
    "merge one more": (folded, lambda m, _: merge(m)),
    "unmerge": (folded, lambda m, _: unmerge(m)),
    "disabled": (adapted, lambda m, _: entered(disabled(m))),
    "disabled while merged": (folded, lambda m, _: entered(disabled(m))),
    "per_row": (plainly, lambda m, _: entered(per_row(m, ["a", "b"]))),
    "merged": (folded, lambda m, _: entered(merged(m))),
    "combine": (plainly, lambda m, _: combine(m, {"a": 1.0, "b": 0.5}, "c")),
    "remove": (adapted, lambda m, _: remove(m, "b")),
    "remove what is not in use": (adapted, lambda m, _: remove(m, "a")),
    "strip": (adapted, lambda m, _: strip(m)),
    "strip what is tied": (tied, lambda m, _: strip(m)),
    "strip what is merged": (folded, lambda m, _: strip(m)),
    "strip a part": (plainly, lambda m, _: strip(m.block)),
    "strip and merge": (folded, lambda m, _: strip(m, merge=True)),
    "strip and keep": (
        lambda: inject(model := plain(), ["k"], r=1, bias="all", train_also=["head"]) and model,
        lambda m, _: strip(m, merge=True),
    ),
    "reset": (adapted, lambda m, _: reset_lora_parameters(m)),
    "lend": (adapted, lambda m, _: lend(m, "note", 1)),
    "take back": (
        lambda: lend(model := adapted(), "note", 1) or model,
        lambda m, _: take_back(m, "note"),
    ),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("adapter") / "b", saved()
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(1)  # other values than those of the model that it is loaded into
    save(model, folder)
    return folder


def steps():
    """Every step of a short commit; of a long one those of its start, and then some."""
    yield from range(25)
    yield from range(25, 100_000, 7)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_call_that_fails_at_any_step_has_changed_nothing(name, file):
    prepare, call = OPERATIONS[name]
    model = prepare()
    before = exact(model)
    done = 0
    for at in steps():
        with Faults(at, ERRORS[at % 3], undo=at % 4) as faults:
            try:
                opened = call(model, file)
            except ERRORS[at % 3]:
                assert faults.raised
                assert changed_parts(before, exact(model)) == []
                done += 1
                continue
        break
    assert not faults.raised
    assert done == at or done > 25
    assert done
    assert changed_parts(before, exact(model)) != []
    if hasattr(opened, "__exit__"):
        opened.__exit__(None, None, None)


BLOCKS = {
    "disabled": (adapted, disabled),
    "disabled while merged": (folded, disabled),
    "disabled part": (plainly, lambda m: disabled(m.block)),
    "per_row": (plainly, lambda m: per_row(m, ["a", None])),
    "merged": (plainly, merged),
    "merged, kept on the CPU": (folded, lambda m: merged(m, keep="cpu")),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_whose_end_is_interrupted_ends_all_the_same(name):
    prepare, make = BLOCKS[name]
    model = prepare()
    before = {k: v for k, v in exact(model).items() if k not in ("states", "marks")}
    for at in steps():
        block = make(model)
        block.__enter__()
        with Faults(at, ERRORS[at % 3], undo=at % 4) as faults:
            try:
                block.__exit__(None, None, None)
            except ERRORS[at % 3]:
                assert faults.raised
        assert changed_parts(before, exact(model)) == []
        if not faults.raised:
            break
    assert at


INSIDE = (
    "inject", "inject with all that trains", "use another", "strip", "strip what is merged",
    "merge", "freeze", "load into one",
)  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_a_call_that_is_interrupted_inside_of_a_step_has_changed_nothing(name, file):
    prepare, call = OPERATIONS[name]
    model = prepare()
    before = exact(model)
    for at in range(0, 100_000, 11):
        interrupt = Interrupt(at)
        previous = sys.gettrace()
        sys.settrace(interrupt)
        try:
            call(model, file)
        except KeyboardInterrupt:
            sys.settrace(previous)
            assert interrupt.raised
            assert changed_parts(before, exact(model)) == []
        else:
            sys.settrace(previous)
            break
    assert not interrupt.raised
    assert at > 11


class Interrupt:
    """Raises before a line of what carries edits out, counted over all of them."""

    def __init__(self, at):
        self.left, self.raised = at, False

    def __call__(self, frame, event, _):
        inside = frame.f_code.co_filename == edits.__file__ and not self.raised
        if inside and (frame.f_code.co_name == "run" or frame.f_code.co_name.startswith("put_")):
            return self.line
        return None

    def line(self, frame, event, _):
        if event == "line" and not self.raised:
            self.left -= 1
            if self.left < 0:
                self.raised = True
                raise KeyboardInterrupt
        return self.line


# --- real signals at random moments --------------------------------------------------------------

RING = (
    lambda m: inject(m, ["lin", "lstm"], r=1, adapter="a", bias="lora_only", seed=0),
    use,
    lambda m: inject(m, ["k"], r=1, adapter="b", bias="all", train_also=["head"], seed=0),
    lambda m: use(m, "a"),
    lambda m: use(m, "b"),
    lambda m: inject(m, ["embed"], r=1, adapter="c", seed=0),
    lambda m: use(m, "c"),
    lambda m: remove(m, "c"),
    lambda m: inject(m.block, ["lin"], r=1, adapter="p", seed=0),
    lambda m: merge(m.block),
    lambda m: unmerge(m.block),
    strip,
)


def form(model):
    """All that tells one step of the ring from another, without the identity of new tensors."""
    return [
        (
            path,
            type(m).__name__,
            [
                (n, t.requires_grad, t.tolist())
                for n, t in (*m._parameters.items(), *m._buffers.items())
                if t is not None
            ],
            getattr(m, "track_running_stats", None),
            [len(v) for k, v in vars(m).items() if k.endswith("_hooks")],
        )
        for path, m in model.named_modules()
    ]


@pytest.mark.filterwarnings("ignore")  # of an interrupt in a destructor, which Python only reports
@pytest.mark.skipif(
    not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread(),
    reason="signals reach the main thread alone, and not on every system",
)
def test_a_call_that_a_signal_interrupts_has_done_all_or_nothing():
    model = plain()
    forms = [form(model)]
    for call in RING:
        call(model)
        forms.append(form(model))
    assert forms[0] == forms[-1]
    draw, at, stopped = random.Random(0), 0, 0
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(600):
            before = exact(model)
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 0.006))
                RING[at](model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                stopped += 1
            now = form(model)
            if now == forms[at + 1]:
                at = (at + 1) % len(RING)
            else:
                assert changed_parts(before, exact(model)) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        # Torch's own switch stays off where an interrupt meets the end of a no_grad block.
        torch.set_grad_enabled(True)
    assert not torch.is_inference_mode_enabled()
    assert stopped > 50
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strip(model)
    assert form(model) == forms[0]
