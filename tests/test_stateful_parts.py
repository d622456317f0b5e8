"""Any order of calls on a model and on its parts, each of which may fail in the middle.

The model has a module at two paths and a parameter that is tied between two parts. Parts are
adapted, switched, merged and stripped on their own and through the whole; blocks on the whole and
on parts end in any order; copies are made at any time, and Parameters replaced. Now and then a step
of a change raises, and so do steps of taking it back: then nothing has changed.
"""

import copy
import pickle
import random
import warnings

import pytest
import torch
from adapters_by_formula import change, methods, randomize
from helpers import Faults, examples
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.nn import functional as F

from lora_inject import (
    LoRAInjectError,
    LoRALayer,
    combine,
    disabled,
    freeze,
    inject,
    merge,
    merged,
    per_row,
    remove,
    strip,
    unmerge,
    use,
)
from lora_inject.core.state import state_of
from lora_inject.core.tensor_marks import mark_of

pytestmark = pytest.mark.cpu("it is about the order of calls")

IDS = torch.tensor([[1, 2, 3], [4, 0, 2]])
PARTS = ["", "", "enc", "dec", "enc.inner", "head", "enc.lin", "dec.shared"]
LAYERS = ["lin", "k", "shared", "embed", "out", "1"]
TIED = ("embed", "out")
CLOSE = {"atol": 1e-9, "rtol": 1e-9}

parts = st.sampled_from(PARTS)
names = st.sampled_from(["a", "fr"])
train_also = st.sampled_from([(), (), (), ("head",), ("embed",), ("out",), ("norm",)])
biases = st.sampled_from(["none", "none", "all", "lora_only"])


injections = st.fixed_dictionaries({
    "path": parts,
    "layers": st.sets(st.sampled_from(LAYERS), min_size=1),
    "name": names,
    "bias": biases,
    "also": train_also,
    "alpha": st.sampled_from([None, 0.5]),
    "method": st.one_of(st.just({}), methods),
})  # fmt: skip


class Net(nn.Module):
    """An embedding tied to a layer of another part, and a layer that two parts share."""

    def __init__(self):
        super().__init__()
        inner = nn.ModuleDict({"lin": nn.Linear(3, 3), "k": nn.Linear(3, 3, bias=False)})
        self.enc = nn.ModuleDict(
            {"embed": nn.Embedding(5, 3), "lin": nn.Linear(3, 3), "inner": inner}
        )
        self.dec = nn.ModuleDict(
            {"lin": nn.Linear(3, 3), "out": nn.Linear(3, 5, bias=False), "norm": nn.LayerNorm(3)}
        )
        self.dec["out"].weight = self.enc["embed"].weight
        self.enc["shared"] = self.dec["shared"] = nn.Linear(3, 3)
        self.head = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))

    def forward(self, ids):
        x = self.enc["shared"](self.enc["lin"](self.enc["embed"](ids)))
        x = x + self.enc["inner"]["k"](torch.tanh(self.enc["inner"]["lin"](x)))
        x = self.dec["norm"](self.dec["lin"](self.dec["shared"](x)))
        return torch.cat([self.dec["out"](x).mean(1), self.head(x.mean(1))], -1)


def by_hand(t, ids):
    """What the model computes for a row, from its tensors by path."""

    def linear(x, path):
        return F.linear(x, t[f"{path}.weight"], t.get(f"{path}.bias"))

    x = linear(linear(F.embedding(ids, t["enc.embed.weight"]), "enc.lin"), "enc.shared")
    x = x + linear(torch.tanh(linear(x, "enc.inner.lin")), "enc.inner.k")
    x = linear(linear(x, "enc.shared"), "dec.lin")
    x = F.layer_norm(x, (3,), t["dec.norm.weight"], t["dec.norm.bias"])
    statistics = t["head.0.running_mean"], t["head.0.running_var"]
    y = F.batch_norm(x.mean(1), *statistics, t["head.0.weight"], t["head.0.bias"])
    return torch.cat([linear(x, "dec.out").mean(1), linear(y, "head.1")], -1)


def build():
    torch.manual_seed(0)
    model = Net().double().eval()
    model.dec["lin"].bias.requires_grad_(False)
    model.head[0].running_mean.add_(0.5)
    model.head.train()[0].eval()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    return model


def raw(tensor):
    return tensor.detach().numpy().tobytes()


def facts(tensor):
    if tensor is None:
        return None
    gradient = None if tensor.grad is None else (id(tensor.grad), raw(tensor.grad))
    return id(tensor), tensor.requires_grad, raw(tensor), gradient, mark_of(tensor)


def everything(modules):
    """What no call that fails may change; and what keeps the ids in it from being used again."""
    found, kept = {}, []
    for path, m in modules.items():
        tensors = [*m._parameters.items(), None, *m._buffers.items()]
        kept += tensors
        found[path] = (
            type(m),
            m.training,
            [item and (item[0], facts(item[1])) for item in tensors],
            sorted(m._non_persistent_buffers_set),
            sorted(vars(m)),
            state_of(m),
            getattr(m, "track_running_stats", None),
            [list(v.items()) for k, v in vars(m).items() if k.endswith("_hooks")],
        )
    return found, kept


def plainly(modules, *, ids):
    """What strip brings back, with the identity of tensors or without it."""
    return {
        path: (
            type(m),
            m.training,
            [
                (n, id(t) if ids else 0, t.requires_grad, raw(t))
                for n, t in (*m._parameters.items(), *m._buffers.items())
                if t is not None
            ],
            sorted(vars(m)),
            getattr(m, "track_running_stats", None),
            [list(v.items()) for k, v in vars(m).items() if k.endswith("_hooks")],
        )
        for path, m in modules.items()
    }


def homes(m):
    """(name, of what, whose, whether it trains) of an adapter's tensors on a module."""
    state = state_of(m)
    if state is None:
        return
    for adapter in state.adapters:
        for name, trains in adapter.parameters.items():
            yield name, name, adapter.name, trains and adapter.name in state.use.trains
    for trained in state.trained:
        for who, name in state.homes(trained).items():
            if who in trained.owners:
                trains = who in state.use.trains and trained.owners[who]
                yield name, trained.name, who, trains


def refused_or_done(call):
    try:
        call()
    except LoRAInjectError:
        return False
    return True


def within(path, part):
    """Whether a module is in a part, by any of its paths."""
    both = ("enc.shared", "dec.shared")
    return not part or any(
        f"{own}.".startswith(f"{part}.") for own in (both if path in both else (path,))
    )


class Parts(RuleBasedStateMachine):
    """The model, the values of its adapters, and what was called on which part."""

    @initialize(first=st.lists(injections, max_size=3))
    def start(self, first):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # many threads are slow on such small tensors
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")
        self.adopt(build())
        self.clean = plainly(self.modules, ids=True), plainly(self.modules, ids=False)
        base = build()
        self.flags = {n: p.requires_grad for n, p in base.named_parameters(remove_duplicate=False)}
        self.base = {n: t.detach() for n, t in base.state_dict().items()}
        self.plain = self.model(IDS).detach()
        self.blocks, self.values, self.calls = [], {}, []
        self.same = True  # whether the tensors are those that the model was made of
        for arguments in first:
            self.try_inject(lambda call: refused_or_done(call), **arguments)

    def adopt(self, model):
        self.model = model
        self.modules = dict(model.named_modules())  # each at its first path
        self.paths = {id(m): path for path, m in self.modules.items()}

    # --- the oracle -----------------------------------------------------------------------------

    def expected(self):
        """The output, from the values that were read and what runs in each module."""
        return torch.cat([self.expected_row(i) for i in range(len(IDS))])

    def expected_row(self, row):
        t, deltas = dict(self.base), []
        for path, m in self.modules.items():
            state = state_of(m)
            if state is None:
                continue
            weights = state.use.weights
            if state.blocks:
                rows = [block.rows for block in state.blocks]
                alone = None if None in rows else rows[-1].names[row]
                weights = {} if alone is None else {alone: 1.0}
            for trained in state.trained:
                for owner in trained.owners:
                    if owner in weights and not state.blocks:
                        for key in self.tied(f"{path}.{trained.name}"):
                            t[key] = self.values[path, trained.name, owner]
            for adapter in state.adapters:
                if adapter.name in weights:
                    who, s, key = adapter.name, adapter.settings, f"{path}.weight"
                    ((_, names),) = adapter.pairs
                    own = {role: self.values[path, name, who] for role, name in names.items()}
                    deltas.append((key, own, s.variant.name, s.scaling, weights[who]))
        whole = dict(t)  # a change may be of what is trained in place, through another place of it
        for key, own, variant, scaling, weight in deltas:
            whole[key] = whole[key] + change(t[key], own, variant, scaling) * weight
        return by_hand(whole, IDS[row : row + 1])

    def tied(self, key):
        """A tensor's name, or both of one that is tied."""
        both = [f"{path}.weight" for path in ("enc.embed", "dec.out")]
        return both if key in both else [key]

    def states(self):
        return [s for m in self.modules.values() if (s := state_of(m)) is not None]

    def read(self):
        return {
            (path, what, who): own.detach().clone()
            for path, m in self.modules.items()
            for name, what, who, _ in homes(m)
            for own in [m._parameters[name] if name in m._parameters else m._buffers[name]]
        }

    @invariant()
    def all_is_as_it_should_be(self):
        if hasattr(self, "model"):
            self.no_value_has_changed_by_itself()
            self.the_output_is_the_oracles()
            self.what_trains_is_what_should()
            if not self.blocks:
                enc, dec = self.model.enc["embed"], self.model.dec["out"]  # as they keep it
                assert enc._parameters["weight"] is dec._parameters["weight"]

    def the_output_is_the_oracles(self):
        torch.testing.assert_close(self.forward(), self.expected(), **CLOSE)

    def forward(self):
        on = [m for m in self.modules.values() if m.training]
        for m in on:
            m.training = False
        with torch.no_grad():
            y = self.model(IDS)
        for m in on:
            m.training = True
        return y

    def no_value_has_changed_by_itself(self):
        now = self.read()
        for key, value in self.values.items():
            assert key not in now or torch.equal(now[key], value), key
        self.values = now

    def what_trains_is_what_should(self):
        found = {}
        for path, m in self.modules.items():
            reached = any(within(path, part) for part, _ in self.calls)
            assert (state_of(m) is not None) is reached, path
            trains = {name: trains for name, _, _, trains in homes(m)}
            for name, t in m._parameters.items():
                if t is not None:
                    fact = trains.get(name, False) if reached else None
                    found.setdefault(id(t), (t, f"{path}.{name}", []))[2].append(fact)
        for t, key, known in found.values():
            known = [fact for fact in known if fact is not None]
            assert t.requires_grad is (any(known) if known else self.flags[key]), (key, known)

    def part(self, path):
        """A part; one with a single end of the tie only while the marks on tensors are there."""
        return self.model.get_submodule(path if self.same or path not in ("enc", "dec") else "")

    def path(self, path):
        return path if self.same or path not in ("enc", "dec") else ""

    # --- a call that may fail -------------------------------------------------------------------

    def go(self, call, data, *, must=False):
        """Whether a call was carried out; else it has changed nothing."""
        at = data.draw(st.one_of(st.none(), st.integers(0, 60)), label="fails at")
        undo = data.draw(st.integers(0, 2), label="fails while it is undone")
        error = data.draw(st.sampled_from([RuntimeError, MemoryError, KeyboardInterrupt]))
        before, _kept = everything(self.modules)
        try:
            if at is None:
                call()
            else:
                with Faults(at, error, undo=undo):
                    call()
        except LoRAInjectError:
            assert not must
        except error:
            assert at is not None
        else:
            return True
        after, _ = everything(self.modules)
        for path, was in before.items():
            assert after[path] == was, path
        return False

    def forget(self, part, adapters=None):
        """The calls on a part and inside of it are undone."""
        self.calls = [
            (root, name)
            for root, name in self.calls
            if not within(root, part) or (adapters is not None and name not in adapters)
        ]

    # --- calls ----------------------------------------------------------------------------------

    @rule(data=st.data(), arguments=injections)
    def inject(self, data, arguments):
        self.try_inject(lambda call: self.go(call, data), **arguments)

    def try_inject(self, go, path, layers, name, bias, also, alpha, method):
        path, here = self.path(path), [p.rpartition(".")[2] for p in self.below(path)]
        options = {
            "r": 1, "alpha": alpha, "adapter": name, "bias": bias, **method,
            "train_also": [top for top in also if top in here],
        }  # fmt: skip
        chosen = sorted(layers & set(here)) or nn.Linear
        if self.reaches_half_of_the_tie(path):
            options["train_also"] = [top for top in options["train_also"] if top not in TIED]
        before = self.forward()
        if go(lambda: inject(self.part(path), chosen, **options)):
            self.calls.append((path, name))
            assert torch.equal(self.forward(), before)
            new = self.read()
            with torch.no_grad():
                for where, m in self.modules.items():
                    for own, what, who, trains in homes(m):
                        if (where, what, who) not in self.values and trains and "lora_" in own:
                            randomize(m._parameters[own], "magnitude" if "magn" in own else "")
            self.values = {k: v for k, v in self.values.items() if k in new}

    def reaches_half_of_the_tie(self, path):
        """Whether no call has told this part of the other place yet."""
        reached = [state_of(self.model.get_submodule(p)) for p in ("enc", "dec")]
        return path in ("enc", "dec") and None in reached

    def below(self, path):
        return [p for p in self.modules if within(p, path)]

    @rule(
        data=st.data(),
        path=parts,
        weights=st.dictionaries(names, st.sampled_from([1.0, 1.0, 0.5]), max_size=2),
        train=st.sampled_from([None, None, [], ["a"]]),
    )
    def use(self, data, path, weights, train):
        path = self.path(path)
        if self.go(lambda: use(self.part(path), weights, train=train), data):
            trains = set(weights if train is None else train)
            for p in self.below(path):
                state = state_of(self.model.get_submodule(p))
                if state is not None and state.is_adapted:
                    assert (state.use.weights, state.use.trains) == (weights, trains)

    @rule(data=st.data(), path=parts, bias=biases, also=train_also)
    def freeze(self, data, path, bias, also):
        path, here = self.path(path), [p.rpartition(".")[2] for p in self.below(path)]
        if any(within(p, path) for p, _ in self.calls):  # else nothing would remember it
            also = [top for top in also if top in here]
            if self.reaches_half_of_the_tie(path):
                also = [top for top in also if top not in TIED]
            if self.go(lambda: freeze(self.part(path), bias, also), data):
                self.calls = [(path if within(p, path) else p, name) for p, name in self.calls]

    @rule(data=st.data(), path=parts, some=st.sampled_from([None, "a"]), keep=st.sampled_from("dc"))
    def merge(self, data, path, some, keep):
        path = "" if self.reaches_half_of_the_tie(path) else path
        keep = {"d": "device", "c": "cpu"}[keep]
        self.go(lambda: merge(self.part(path), some, keep=keep), data)

    @rule(data=st.data(), path=parts)
    def unmerge(self, data, path):
        self.go(lambda: unmerge(self.part(path)), data)

    @rule(data=st.data(), path=parts)
    def combine(self, data, path):
        if self.go(lambda: combine(self.part(path), {"a": 1.0, "fr": -0.5}, "both"), data):
            self.calls.append((self.path(path), "both"))

    @rule(data=st.data(), path=parts, name=names)
    def remove(self, data, path, name):
        path = self.path(path)
        if self.go(lambda: remove(self.part(path), name), data):
            self.forget(path, {name})

    @rule(data=st.data(), path=parts)
    def strip(self, data, path):
        path = self.path(path)
        must = not path and not any(any(block[1]) for block in self.blocks)
        if self.go(lambda: strip(self.part(path)), data, must=must):
            self.forget(path)

    # --- blocks ---------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        path=parts,
        kind=st.sampled_from(["disabled", "disabled", "per_row", "merged"]),
        rows=st.lists(st.sampled_from([None, "a", "fr"]), min_size=2, max_size=2),
    )
    @precondition(lambda self: len(self.blocks) < 3)
    def enter(self, data, path, kind, rows):
        part = self.part("" if self.reaches_half_of_the_tie(path) else path)
        make = {
            "disabled": disabled, "per_row": lambda m: per_row(m, rows), "merged": merged,
        }[kind]  # fmt: skip
        block = make(part)
        must = kind == "disabled" and any(
            state.is_adapted for m in self.modules.values() if (state := state_of(m))
        )
        if self.go(block.__enter__, data, must=must and part is self.model):
            inside = [m for m in part.modules() if (s := state_of(m)) and s.is_adapted and s.blocks]
            self.blocks.append((block, inside if kind != "merged" else []))

    @rule(data=st.data())
    @precondition(lambda self: self.blocks)
    def leave(self, data):
        block, inside = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        at = data.draw(st.one_of(st.none(), st.integers(0, 40)), label="fails at")
        counts = [len(state_of(m).blocks) for m in inside]
        try:
            if at is None:
                block.__exit__(None, None, None)
            else:
                with Faults(at, undo=data.draw(st.integers(0, 2))):
                    block.__exit__(None, None, None)
        except RuntimeError as error:
            assert str(error) == "no"  # noqa: PT017 (it is ended all the same)
        assert [len(state_of(m).blocks) for m in inside] == [n - 1 for n in counts]

    @rule()
    def off_is_the_base(self):
        if any(state.is_adapted for m in self.modules.values() if (state := state_of(m))):
            with disabled(self.model):
                assert torch.equal(self.forward(), self.plain)
        else:
            assert torch.equal(self.forward(), self.plain)

    # --- what others do to the model ------------------------------------------------------------

    @rule(scale=st.sampled_from([0.5, -0.25]))
    @precondition(lambda self: not any(s.merged or s.blocks for s in self.states()))
    def train(self, scale):
        done = set()
        with torch.no_grad():
            for m in self.modules.values():
                for name, _, _, trains in homes(m):
                    t = m._parameters.get(name)
                    if trains and t is not None and id(t) not in done and t.requires_grad:
                        t.add_(scale)
                        done.add(id(t))
        self.values = self.read()

    @rule()
    def run_in_training_mode(self):
        """Statistics move where an adapter that trains owns them, and nowhere else."""
        state = state_of(self.model.head[0])
        if state is None or (not state.blocks and not state.merged):
            self.model.head[0].train(state is not None)
            self.model(IDS)
            if state is not None and state.statistics_move():
                self.values = self.read()

    @rule(pickled=st.booleans())
    def copy_the_model(self, pickled):
        try:
            made = pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model)
        except LoRAInjectError:
            assert any(block[1] for block in self.blocks)
            return
        assert not any(block[1] for block in self.blocks)
        if not self.blocks:
            self.adopt(made)
            self.same = False

    @rule()
    def replace_parameters(self):
        """Every Parameter is another one, ties kept, as sharding and assigned checkpoints do it."""
        made = {}
        for m in self.modules.values():
            for name, t in m._parameters.items():
                if t is not None:
                    new = nn.Parameter(t.detach().clone(), requires_grad=t.requires_grad)
                    m._parameters[name] = made.setdefault(t, new)
        self.same = False

    @rule()
    def cast(self):
        self.model.to(torch.float64)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        order = random.Random(len(self.values) + len(self.calls))
        order.shuffle(self.blocks)
        for block, _ in self.blocks:
            block.__exit__(None, None, None)
        for path in order.sample(PARTS[2:], order.randrange(4)):
            try:
                strip(self.part(path))
            except LoRAInjectError:
                assert path
        strip(self.model)
        self.model.head[0].eval()
        assert not any(isinstance(m, LoRALayer) for m in self.modules.values())
        now = plainly(self.modules, ids=self.same)
        for path, was in self.clean[0 if self.same else 1].items():
            assert now[path] == was, path
        assert not any(vars(p) for p in self.model.parameters())
        self.warnings.__exit__(None, None, None)
        torch.set_num_threads(self.threads)


TestParts = Parts.TestCase
TestParts.settings = settings(
    max_examples=examples(2),
    stateful_step_count=20,
    deadline=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
