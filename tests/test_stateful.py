"""Any order of calls on a model with several adapters, against an oracle in plain torch.

The adapters are of several variants and starts, and act beside the forward or in the weight.

The oracle keeps a copy of the base, and of each adapter the values that it has: its pairs, and what
it trained in place. They are read from the model only when they were made or trained. What the
model should compute follows from the base with these in its weights, by the papers' formulas.
"""

import copy
import pickle
import tempfile

import pytest
import torch
from adapters_by_formula import (
    STARTS_ELSEWHERE,
    Values,
    frozen_roles,
    methods,
    randomize,
    roles_of,
    scaling_of,
)
from helpers import changed_parts, examples, snapshot
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from lora_inject import (
    ArgumentError,
    FormatError,
    LoRAInjectError,
    LoRALayer,
    UnsupportedLayerError,
    combine,
    disabled,
    freeze,
    inject,
    load,
    lora_parameters,
    merge,
    per_row,
    remove,
    save,
    strip,
    unmerge,
    use,
)

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings("ignore:.*more parameters than what is adapted"),
    pytest.mark.filterwarnings("ignore:the adapter was trained with"),
]

NAMES = ["default", "fr", "fr_x", "A"]
TARGETS = ["q", "k", "conv", "embed", "out"]
TIED = {"embed", "out"}
BIASES = {"q": "q.bias", "conv": "conv.bias"}  # the biases of the layers in TARGETS
ALL_BIASES = {"q.bias", "conv.bias", "head.0.bias", "head.1.bias"}
HEAD = {
    "head.0.weight", "head.0.bias", "head.0.running_mean", "head.0.running_var",
    "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
}  # fmt: skip
FULL = 4  # the rank of any change of these layers
PORTABLE = {"portable": True}
WAYS = {"loha": "weight"}
CLOSE = {"atol": 1e-10, "rtol": 1e-10}

weights = st.sampled_from([1.0, 1.0, 0.5, -0.7])
biases = st.sampled_from(["none", "none", "none", "none", "lora_only", "all"])

ways = st.sampled_from(["auto", "auto", "auto", "weight"])
injections = st.fixed_dictionaries({
    "paths": st.sets(st.sampled_from(TARGETS), min_size=1, max_size=3),
    "r": st.integers(1, 3),
    "alpha": st.sampled_from([None, 0.5, 4.0]),
    "bias": biases,
    "head": st.sampled_from([False, False, False, True]),
    "method": methods,
})  # fmt: skip


class Net(nn.Module):
    """A Linear called twice, an Embedding tied to a layer, a convolution, a BatchNorm head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4, bias=False)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.tanh(self.q(x)) + self.k(x)
        # Contiguous: how torch multiplies others depends on requires_grad, in the last bit.
        x = x + self.q(self.conv(x.mT.contiguous()).mT.contiguous())
        return torch.cat([self.out(x).mean(1), self.head(x.mean(1))], -1)


def ids():
    """The input, always the same."""
    return torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1], [2, 2, 5, 3]])


def build():
    """The same net at every call, with running statistics that are not the first ones."""
    torch.manual_seed(0)
    model = Net().double()
    for _ in range(3):
        model(ids())
    return model


def run(model):
    """The output in eval mode."""
    training = model.training
    with torch.no_grad():
        output = model.eval()(ids())
    model.train(training)
    return output


def cannot_start(targets, method):
    """Whether these layers cannot have this variant with this start and this fixed factor."""
    variant, init, fixed = method["variant"], method["init"], method["fixed"]
    if variant == "loha":
        return init != "default" or fixed is not None
    if variant == "dora" and TIED & targets:  # whose rows are the columns of the other
        return True
    if init in STARTS_ELSEWHERE or fixed is None:
        return False
    zeros = {"A" if init == "mica" or path == "embed" else "B" for path in targets}
    return fixed in zeros


def placed(targets):
    """The layers on which an adapter for these targets stands: it stands on both tied ones."""
    return set(targets) | (TIED if TIED & set(targets) else set())


class Adapters(RuleBasedStateMachine):
    """The model, and what the oracle knows of it."""

    @initialize(first=st.lists(injections, max_size=3), how=ways)
    def start(self, first, how):
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # many threads are slow on such small tensors
        self.model, self.base = build(), build().requires_grad_(False).eval()
        self.plain = run(self.model)
        self.clean = snapshot(self.model)
        self.parts = list(self.clean)
        self.known, self.in_use, self.training, self.folded = {}, {}, set(), set()
        self.how = how  # both in one layer are refused
        for arguments in first:
            self.inject(**arguments)

    # --- the oracle -----------------------------------------------------------------------------

    def expected(self, chosen):
        """The output of the base where these adapters' values and changes stand in its weights."""
        tensors = self.base.state_dict()
        for name, weight in chosen.items():
            values = self.known[name]
            tensors.update(values.own)
            for path in values.pairs.keys() - {"out"}:  # tied to embed
                former = self.base.get_submodule(path).weight
                key = f"{path}.weight"
                tensors[key] = tensors[key] + weight * values.change(path, former)
        tensors["out.weight"] = tensors["embed.weight"]
        with torch.no_grad():
            return torch.func.functional_call(self.base, tensors, ids())

    def read(self, name):
        """Take an adapter's values over from the model."""
        values, suffix = self.known[name], "" if name == "default" else f"_{name}"
        for path in placed(values.targets):
            layer = self.model.get_submodule(path)
            values.pairs[path] = {
                role: layer.get_parameter(f"lora_{role}{suffix}").detach().clone()
                for role in values.roles
            }
        if name in self.in_use:
            tensors = self.model.state_dict()
            values.own = {key: tensors[key].clone() for key in values.own}

    def owned(self, targets, bias, head):
        """What an adapter trains in place."""
        names = {"none": set(), "all": ALL_BIASES}.get(bias)
        if names is None:
            names = {BIASES[path] for path in placed(targets) if path in BIASES}
        return names | (HEAD if head else set())

    def owners(self, keys):
        """The adapters in use that own one of these tensors."""
        return [name for name in self.in_use if keys & self.known[name].own.keys()]

    def base_values(self, keys):
        tensors = self.base.state_dict()
        return {key: tensors[key].clone() for key in keys}

    def refused(self, error, call, *args, **kwargs):
        """The call raises the error and changes nothing."""
        before = snapshot(self.model)
        with pytest.raises(error):
            call(*args, **kwargs)
        assert changed_parts(before, snapshot(self.model)) == []

    def changed(self, before, model):
        """The parts that differ, of those that a copy of a model has in common with it."""
        return [part for part in changed_parts(before, snapshot(model)) if part in self.parts]

    def new_name(self):
        return next((name for name in [*NAMES, "x", "y", "z"] if name not in self.known), None)

    def pick(self, data, names, least=1):
        """Some of these names."""
        return data.draw(st.lists(st.sampled_from(sorted(names)), min_size=least, unique=True))

    def mostly_plain(self, data):
        """The adapters that own nothing in place; now and then, or if there are none, all."""
        plain = sorted(name for name, values in self.known.items() if not values.own)
        return plain if plain and data.draw(st.integers(0, 5)) else sorted(self.known)

    # --- what may be called at any time ---------------------------------------------------------

    @invariant()
    def the_output_is_the_oracles(self):
        torch.testing.assert_close(run(self.model), self.expected(self.in_use), **CLOSE)
        if not self.in_use:
            assert torch.equal(run(self.model), self.plain)
            assert not any(isinstance(module, LoRALayer) for module in self.model.modules())

    @invariant()
    def no_adapter_has_changed_by_itself(self):
        for name, values in self.known.items():
            before = copy.copy(values.pairs), values.own
            self.read(name)
            assert all(
                torch.equal(tensor, values.pairs[path][role])
                for path, pair in before[0].items()
                for role, tensor in pair.items()
            )
            assert all(torch.equal(before[1][key], values.own[key]) for key in values.own)

    @invariant()
    def only_what_should_train_does(self):
        for name, values in self.known.items():
            suffix = "" if name == "default" else f"_{name}"
            for path in values.pairs:
                layer = self.model.get_submodule(path)
                for role in values.roles:
                    trains = name in self.training and not values.stays(path, role)
                    parameter = layer.get_parameter(f"lora_{role}{suffix}")
                    assert parameter.requires_grad is trains
        own = {key for n in self.in_use for key in self.known[n].own if n in self.training}
        for key in self.known and dict(self.base.named_parameters()):
            assert key in own or not self.model.get_parameter(key).requires_grad

    @rule()
    @precondition(lambda self: self.known)
    def run_in_training_mode(self):
        """Statistics move where an adapter that trains owns them, and nowhere else."""
        # What has moved while it is merged is not what was there before it was.
        assume(not (self.folded and any(self.known[n].own for n in self.in_use)))
        self.model.train()(ids())
        for name in self.training & self.in_use.keys():
            self.read(name)

    @rule()
    @precondition(lambda self: self.known)
    def disable(self):
        before, flags = run(self.model), snapshot(self.model)
        with pytest.raises(ZeroDivisionError), disabled(self.model):  # noqa: PT012
            assert torch.equal(run(self.model), self.plain)
            1 / 0  # noqa: B018
        assert torch.equal(run(self.model), before)
        assert changed_parts(flags, snapshot(self.model)) == []

    @rule(pickled=st.booleans())
    def copy_the_model(self, pickled):
        former = self.model
        self.model = pickle.loads(pickle.dumps(former)) if pickled else copy.deepcopy(former)
        if self.known:
            strip(former)
        assert self.changed(self.clean, former) == []
        self.parts = ["training", "state", "attributes"]  # a copy has other objects

    @rule()
    def cast(self):
        self.model.to(torch.float64)

    # --- merging --------------------------------------------------------------------------------

    @rule(data=st.data(), keep=st.sampled_from(["device", "cpu"]))
    @precondition(lambda self: self.in_use.keys() - self.folded)
    def fold(self, data, keep):
        some = data.draw(st.booleans())
        names = self.pick(data, self.in_use.keys() - self.folded) if some else list(self.in_use)
        args = (self.model, names if some else None)
        if any(TIED & placed(self.known[name].targets) for name in names) or self.leaves_dora(
            names
        ):
            self.refused(UnsupportedLayerError, merge, *args, keep=keep)
        else:
            if not self.folded:
                self.unmerged = run(self.model), snapshot(self.model)
            merge(*args, keep=keep)
            self.folded |= set(names)

    def leaves_dora(self, names):
        """Whether a DoRA in use would stand beside a weight that is not the former one any more."""
        folded = self.folded | set(names)
        paths = {path for name in names for path in self.known[name].ways}
        left = (self.known[name] for name in self.in_use.keys() - folded)
        return any(values.variant == "dora" and paths & values.ways.keys() for values in left)

    @rule()
    @precondition(lambda self: self.folded)
    def unfold(self):
        unmerge(self.model)
        self.folded = set()
        assert torch.equal(run(self.model), self.unmerged[0])
        parts = self.parts if id(self.model) == self.unmerged[1]["modules"][0][1] else ["state"]
        assert not set(changed_parts(self.unmerged[1], snapshot(self.model))) & set(parts)

    @rule()
    @precondition(lambda self: self.folded)
    def all_else_is_refused_while_merged(self):
        name = min(self.known)
        for call in (
            lambda: use(self.model),
            lambda: remove(self.model, name),
            lambda: freeze(self.model),
            lambda: inject(self.model, "q", r=1, adapter="new"),
            lambda: combine(self.model, {name: 1.0}, "new"),
            lambda: per_row(self.model, [None] * 3).__enter__(),
        ):
            self.refused(LoRAInjectError, call)

    # --- what needs a model that is not merged --------------------------------------------------

    @rule(arguments=injections)
    @precondition(lambda self: not self.folded and self.new_name())
    def inject_one(self, arguments):
        self.inject(**arguments)

    def inject(self, paths, r, alpha, bias, head, method):
        """Inject one more adapter, or see it refused."""
        name, before = self.new_name(), run(self.model)
        targets = paths - ({"out"} if paths >= TIED else set())
        options = {"r": r, "alpha": alpha, "bias": bias, "adapter": name, "how": self.how, **method}
        options["train_also"] = ["head"] if head else []
        own, variant, init = self.owned(targets, bias, head), method["variant"], method["init"]
        in_weight = "weight" in (self.how, WAYS.get(variant))
        ways = {path: self.way(path, in_weight) for path in placed(targets)}
        if self.owners(own) or cannot_start(targets, method) or None in ways.values():
            self.refused(LoRAInjectError, inject, self.model, sorted(targets), **options)
            return
        inject(self.model, sorted(targets), **options)
        assert torch.equal(run(self.model), before)
        self.known[name] = Values(
            scaling_of(alpha, r, method["scaling"]), targets, variant,
            tuple(roles_of(variant, init)), frozenset(frozen_roles(init, method["fixed"])),
            ways=ways, own=self.base_values(own),
        )  # fmt: skip
        self.in_use[name] = 1.0
        self.training.add(name)
        self.randomize(name)
        self.read(name)

    def way(self, path, in_weight):
        """How a new adapter acts in a layer: as those that are there; None where it cannot."""
        there = next((v.ways[path] for v in self.known.values() if path in v.ways), None)
        if in_weight:
            return "weight" if there != "branch" else None
        return there or "branch"

    def randomize(self, name):
        """Give what trains values that matter."""
        values, suffix = self.known[name], "" if name == "default" else f"_{name}"
        with torch.no_grad():
            for path in sorted(values.targets):
                layer = self.model.get_submodule(path)
                for role in values.roles:
                    if role not in values.never:
                        randomize(layer.get_parameter(f"lora_{role}{suffix}"), role)
            for key in values.own:
                self.model.state_dict(keep_vars=True)[key].add_(1)

    @rule(data=st.data(), weighted=st.booleans())
    @precondition(lambda self: self.known and not self.folded)
    def use_some(self, data, weighted):
        names = self.pick(data, self.known, least=0)
        chosen = {name: data.draw(weights) if weighted else 1.0 for name in names}
        train = self.pick(data, self.known, least=0) if data.draw(st.booleans()) else None
        args = (self.model, chosen) if weighted else (self.model, *names)
        keys = [key for name in names for key in self.known[name].own]
        heavy = any(self.known[name].own and chosen[name] != 1.0 for name in names)
        if heavy or len(keys) > len(set(keys)):
            self.refused(ArgumentError, use, *args, train=train)
            return
        use(*args, train=train)
        self.in_use = chosen
        self.training = set(chosen if train is None else train)

    @rule(data=st.data())
    @precondition(lambda self: self.known and not self.folded)
    def remove_some(self, data):
        names = self.pick(data, self.known)
        remove(self.model, names)
        self.forget(names)

    def forget(self, names):
        self.known = {n: v for n, v in self.known.items() if n not in names}
        self.in_use = {n: w for n, w in self.in_use.items() if n not in names}
        self.training -= set(names)
        if not self.known:
            assert self.changed(self.clean, self.model) == []

    @rule()
    @precondition(lambda self: self.training & self.in_use.keys() and not self.folded)
    def train(self):
        parameters = lora_parameters(self.model)
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            (self.model.train()(ids()) - 0.1).square().mean().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)  # large scalings would diverge
            optimizer.step()
        for name in self.training & self.in_use.keys():
            self.read(name)

    @rule(data=st.data())
    @precondition(lambda self: self.known and not self.folded)
    def rows(self, data):
        some = self.mostly_plain(data)
        names = data.draw(st.lists(st.sampled_from([None, *some]), min_size=3, max_size=3))
        if any(self.known[name].own for name in names if name):
            self.refused(LoRAInjectError, per_row(self.model, names).__enter__)
            return
        if any("weight" in self.known[name].ways.values() for name in names if name):
            self.refused(UnsupportedLayerError, per_row(self.model, names).__enter__)
            return
        alone = [self.expected({name: 1.0} if name else {})[i] for i, name in enumerate(names)]
        before = run(self.model)
        with per_row(self.model, names):
            torch.testing.assert_close(run(self.model), torch.stack(alone), **CLOSE)
        assert torch.equal(run(self.model), before)

    @rule(data=st.data())
    @precondition(lambda self: self.known and not self.folded and self.new_name())
    def combine_some(self, data):
        mix = {name: data.draw(weights) for name in self.pick(data, self.mostly_plain(data))}
        name, before = self.new_name(), run(self.model)
        assume(sum(values.rank for values in self.known.values()) < 40)  # they would add up
        if any(self.known[other].own for other in mix):
            self.refused(ArgumentError, combine, self.model, mix, name)
            return
        options = data.draw(st.sampled_from([{}, {"how": "svd", "r": FULL}]))
        if not options and any(self.known[other].variant == "dora" for other in mix):
            self.refused(UnsupportedLayerError, combine, self.model, mix, name)
            return
        combine(self.model, mix, name, **options)
        assert torch.equal(run(self.model), before)
        expected = self.expected(mix)
        ways = {path: way for other in mix for path, way in self.known[other].ways.items()}
        self.known[name] = Values(1.0, set(ways), ways=ways)
        self.read(name)
        torch.testing.assert_close(self.expected({name: 1.0}), expected, **CLOSE)

    @rule(bias=biases, head=st.booleans())
    @precondition(lambda self: self.known and not self.folded)
    @precondition(lambda self: all(weight == 1.0 for weight in self.in_use.values()))
    def freeze_all(self, bias, head):
        used = [self.known[name] for name in self.in_use]
        own = self.owned(set().union(*(values.targets for values in used)), bias, head)
        train_also = ["head"] if head else []
        if own and len(used) != 1:
            self.refused(ArgumentError, freeze, self.model, bias, train_also)
            return
        before = run(self.model)
        freeze(self.model, bias, train_also)
        assert torch.equal(run(self.model), before)
        self.training = set(self.in_use)
        for values in used:
            values.own = self.base_values(own) | values.own
            values.frozen = True

    @rule(data=st.data())
    @precondition(lambda self: not self.folded and self.new_name())
    @precondition(lambda self: any(not values.frozen for values in self.known.values()))
    def save_and_load(self, data):
        saved = data.draw(st.sampled_from(sorted(n for n, v in self.known.items() if not v.frozen)))
        name, before, values = self.new_name(), run(self.model), self.known[saved]
        options = data.draw(st.sampled_from([{}, {}, PORTABLE, {**PORTABLE, "r": FULL}]))
        with tempfile.TemporaryDirectory() as folder:
            if self.has_no_file(values, options):
                self.refused(FormatError, save, self.model, folder, adapter=saved, **options)
                return
            save(self.model, folder, adapter=saved, **options)
            load(self.model, folder, adapter=name)
        self.known[name] = copy.copy(values)
        self.known[name].own, self.known[name].pairs = copy.copy(values.own), {}
        if options:
            plain = Values(1.0, values.targets, ways=values.ways, own=copy.copy(values.own))
            self.known[name] = plain
        self.read(name)
        new = self.known[name]
        new.turned = frozenset(
            path
            for path in TIED & new.pairs.keys()  # whichever leads: the table, or the layer
            if (new.pairs[path]["A"].shape[1] != values.pairs[path]["A"].shape[1])
            is not (path in values.turned)
        )
        expected = self.expected({saved: 1.0})
        torch.testing.assert_close(self.expected({name: 1.0}), expected, **CLOSE)
        if self.in_use:
            assert torch.equal(run(self.model), before)
        else:
            self.in_use = {name: 1.0}
            self.training.add(name)

    def has_no_file(self, values, options):
        """Whether PEFT has no word for it: no LoHa of a table or with biases, no B A of DoRA."""
        if values.variant == "loha" and not options:
            return bool(values.own or TIED & values.targets)
        return values.variant == "dora" and options == PORTABLE

    # --- the way back ---------------------------------------------------------------------------

    @rule()
    @precondition(lambda self: len(self.known) > 3)  # else few runs would ever have so many
    def strip_many(self):
        self.strip_all()

    def strip_all(self):
        """All the way back."""
        strip(self.model)
        self.folded = set()
        self.forget(list(self.known))

    @rule()
    @precondition(lambda self: self.in_use)
    def strip_a_copy_with_merge(self):
        twin, before = copy.deepcopy(self.model), run(self.model)
        tied = any(TIED & placed(self.known[name].targets) for name in self.in_use)
        if tied:
            with pytest.raises(UnsupportedLayerError):
                strip(twin, merge=True)
        else:
            strip(twin, merge=True)
            assert set(twin.state_dict()) == set(self.base.state_dict())
        torch.testing.assert_close(run(twin), before, **CLOSE)

    def teardown(self):
        if getattr(self, "known", None):
            self.strip_all()
        torch.set_num_threads(self.threads)


TestAdapters = Adapters.TestCase
TestAdapters.settings = settings(
    max_examples=examples(1.5),
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.generate],
)
