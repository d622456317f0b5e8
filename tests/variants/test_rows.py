"""Rows of tables that train alone: embeddings and output heads, tied ones included."""

import copy
import pickle

import pytest
import torch
from every_kind import Scaled
from helpers import changed_parts, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lora_inject import (
    LoRAInjectError,
    combine,
    disabled,
    inject,
    load_lora_state_dict,
    lora_state_dict,
    merge,
    param_groups,
    per_row,
    plan,
    reset_lora_parameters,
    strip,
    unmerge,
    use,
)

IDS = [7, 3]  # not in order, and both among the tokens below
pytestmark = pytest.mark.usefixtures("device")


def tokens():
    return torch.tensor([[1, 7, 3, 0], [7, 7, 8, 2]])


class Words(nn.Module):
    """An embedding and a head, which may share their table."""

    def __init__(self, tied=True, embedding=nn.Embedding, **options):
        super().__init__()
        self.emb, self.mid = embedding(9, 4, **options), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=not tied)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mid(self.emb(tokens))))


class Reads(Words):
    """A head that is no module: the table is read."""

    def forward(self, tokens):
        return F.linear(torch.tanh(self.mid(self.emb(tokens))), self.emb.weight)


def tied():
    return Words()


def untied():
    return Words(tied=False)


def scaled():
    return Words(embedding=Scaled)


MODELS = {
    "tied": (tied, {"emb": IDS}, {}),
    "tied, by its head": (tied, {"head": IDS}, {}),
    "embedding": (untied, {"emb": IDS}, {}),
    "head": (untied, {"head": IDS}, {}),
    "both": (untied, {"emb": IDS, "head": [3, 5, 8]}, {}),
    "scaled": (scaled, {"emb": IDS}, {}),
    "read": (Reads, {"emb": IDS}, {"how": "weight"}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name, dtype=torch.float32, **more):
    torch.manual_seed(0)
    build, rows, _ = MODELS[name]
    model = build().to(dtype)
    base = copy.deepcopy(model)
    inject(model, (), rows=rows, **more)
    return model, base


def moved(model, scale=0.5):
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.add_(scale * noise.to(parameter))
    return model


def written_out(model, base, weights=None):
    """The base with the rows in its tables, every matrix made."""
    tables = {}
    for path, module in model.named_modules():
        for adapter in getattr(module, "lora_adapters", ()):
            name, weight = f"{path}.weight", 1.0 if weights is None else weights[adapter.name]
            for _, names in adapter.pairs:
                ids = torch.tensor(adapter.settings.variant.ids)
                table = tables.get(name, module._parameters["weight"])
                rows = weight * module.get_parameter(names["rows"])
                tables[name] = table.index_add(0, ids, rows)
    twin = copy.deepcopy(base)
    if twin.head.weight is twin.emb.weight:
        twin.head.weight = nn.Parameter(twin.emb.weight.detach().clone())
    return torch.func.functional_call(twin, tables, (tokens(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_model
def test_fresh_rows_change_no_bit(name, dtype):
    torch.manual_seed(0)
    build, rows, _ = MODELS[name]
    model = build().to(dtype)
    expected = copy.deepcopy(model).requires_grad_(False)(tokens())
    inject(model, (), rows=rows)
    assert torch.equal(model(tokens()), expected)


@every_model
def test_values_and_gradients_are_those_of_the_formula(name):
    model, base = made(name, torch.float64)
    moved(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    output, expected = model(tokens()), written_out(model, base)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(output, base(tokens()))
    direction = torch.randn(output.shape, dtype=torch.float64)
    ours = torch.autograd.grad((output * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        assert one.norm() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@every_model
def test_trained_copied_disabled_and_stripped(name):
    torch.manual_seed(0)
    build, rows, _ = MODELS[name]
    model = build()
    before, expected = snapshot(model), model(tokens())
    inject(model, (), rows=rows)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens()).pow(2).sum().backward()
        optimizer.step()
    trained = model(tokens())
    assert not torch.equal(trained, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()), trained)
    with disabled(model):
        assert torch.equal(model(tokens()), expected)
    strip(model)
    assert changed_parts(before, snapshot(model)) == []
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["embedding", "head", "both"])
def test_merged_rows_are_summed_and_rounded_once(name, dtype):
    model, base = made(name, dtype)
    moved(model)
    expected = model(tokens())
    tables = {
        path: (
            module.weight.detach().float().clone(),
            torch.tensor(sorted(ids)),
            module.lora_rows.detach(),
        )
        for path, ids in MODELS[name][1].items()
        for module in [model.get_submodule(path)]
    }
    merge(model)
    for path, (table, ids, rows) in tables.items():
        merged = model.get_submodule(path).weight
        assert torch.equal(merged, table.index_add(0, ids, rows).to(dtype))
    torch.testing.assert_close(model(tokens()), expected, rtol=2e-2, atol=2e-2)
    unmerge(model)
    assert torch.equal(model(tokens()), expected)
    strip(model, merge=True)
    untouched = [i for i in range(9) if i not in (3, 5, 7, 8)]
    assert torch.equal(model.emb.weight[untouched], base.emb.weight[untouched])


@every_model
def test_two_in_use_with_weights_add_up_in_any_order(name):
    model, base = made(name, torch.float64, adapter="one")
    inject(model, (), rows={path: [3, 4] for path in MODELS[name][1]}, adapter="two")
    use(model, "one", "two", train=("one", "two"))
    moved(model)
    outputs = []
    for weights in ({"one": 0.7, "two": -0.4}, {"two": -0.4, "one": 0.7}):
        use(model, weights)
        outputs.append(model(tokens()))
    expected = written_out(model, base, weights)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs[1], expected, rtol=1e-12, atol=1e-12)


def test_beside_lora_on_other_layers_and_on_the_same_by_two_adapters():
    torch.manual_seed(0)
    model = untied()
    expected = copy.deepcopy(model).requires_grad_(False)(tokens())
    made = inject(model, "mid", r=2, rows={"emb": IDS}, dropout=0.5, layers=None, seed=0)
    assert made.split == {"lora_A": 8, "lora_B": 8, "bias": 0, "train_also": 0, "other": 0,
                          "lora_rows": 8}  # fmt: skip
    inject(model, "emb", r=2, adapter="low")
    use(model, "default", "low")
    assert torch.equal(model.eval()(tokens()), expected)
    moved(model)
    assert not torch.equal(model(tokens()), expected)


def test_blocks_do_not_concern_rows_and_the_plan_shows_them():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "layers": nn.ModuleList([nn.Linear(4, 4)])})
    shown = plan(model, nn.Linear, r=2, layers=[0], rows={"emb": IDS})
    assert [(site.path, site.parameters) for site in shown.sites] == [("layers.0", 16), ("emb", 8)]
    assert "2, rows" in str(shown)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, one.numel())
        return made


def test_nothing_of_the_size_of_the_table_is_made():
    model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 1000, bias=False))
    model[1].weight = model[0].weight
    inject(model, (), rows={"0": [5, 999]})
    few = torch.tensor([[5, 1, 999]])
    with Sizes() as sizes:
        model(few).sum().backward()
    assert sizes.largest == 3 * 1000  # the output of the head
    assert model[0].lora_rows.grad.shape == (2, 16)


def test_gradients_follow_the_options_of_the_embedding():
    torch.manual_seed(0)
    for options in ({"padding_idx": 7}, {"scale_grad_by_freq": True}, {"sparse": True}):
        model = Words(tied=False, **options)
        full = copy.deepcopy(model)
        inject(model, (), rows={"emb": IDS})
        for one in (model, full):
            one(tokens()).pow(2).sum().backward()
        wanted = full.emb.weight.grad
        wanted = (wanted.to_dense() if wanted.is_sparse else wanted)[sorted(IDS)]
        torch.testing.assert_close(model.emb.lora_rows.grad, wanted)


def test_ids_of_any_shape_and_dtype():
    emb = nn.Embedding(9, 4)
    inject(emb, (), rows={nn.Embedding: IDS})
    model = moved(nn.Sequential(emb))
    table = emb.weight.detach().index_add(0, torch.tensor(sorted(IDS)), emb.lora_rows.detach())
    for ids in (torch.tensor(7), torch.tensor([], dtype=torch.long), tokens().mT, tokens().int()):
        assert torch.equal(model(ids), F.embedding(ids, table))


def test_compiled_in_one_graph_and_exported():
    model, _ = made("tied")
    moved(model)
    expected = model(tokens())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), expected)
    exported = torch.export.export(model, (tokens(),)).module()
    torch.testing.assert_close(exported(tokens()), expected)


def test_under_autocast_and_from_meta(device):
    model, base = made("tied")
    moved(model)
    with torch.autocast(device.type, torch.bfloat16):
        assert model(tokens()).dtype is torch.bfloat16
        torch.testing.assert_close(model(tokens()), written_out(model, base), rtol=5e-2, atol=5e-2)
    with torch.device("meta"):
        twin = Words()
    inject(twin, (), rows={"emb": IDS})
    twin.to_empty(device=device)
    twin.load_state_dict(base.state_dict(), strict=False)
    twin.head.weight = twin.emb.weight
    reset_lora_parameters(twin)
    assert torch.equal(twin(tokens()), base(tokens()))
    assert twin.head.lora_rows is twin.emb.lora_rows


def test_a_state_dict_holds_what_is_added():
    model, _ = made("both")
    moved(model)
    assert {key: tuple(t.shape) for key, t in lora_state_dict(model).items()} == {
        "emb.lora_rows": (2, 4), "head.lora_rows": (3, 4)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], r"^rows\['emb'\] must be ids .*, not \[\]\."), ([3, 3], "some with 3 in it twice"),
     ([-1, 2], "from 0 on"), ([2**31], "must be ids"), ([2**31 - 1], "asks for 2147483647"),
     ([True], "must be ids"), ([1.5], "must be ids"), (7, "must be ids"), ("ab", "must be ids"),
     (None, "must be ids"), ([2**40], "must be ids"),
     ([8, 9, 11], r"emb: it has 9 rows, from 0 on, and rows= asks for 9, 11\. Resize it first")],
)  # fmt: skip
def test_ids_that_are_no_rows_are_refused(ids, message):
    model = untied()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, "mid", rows={"emb": ids})
    assert changed_parts(before, snapshot(model)) == []


def test_what_has_no_rows_or_two_adapters_in_one_is_refused():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.old, self.conv = nn.Embedding(9, 4), Conv1D(4, 4), nn.Conv1d(4, 4, 1)
            self.lin, self.attention = nn.Linear(4, 6), nn.MultiheadAttention(4, 2)
            self.packed = nn.Linear(4, 9)
            self.packed.weight = nn.Parameter(torch.ones(9, 4, dtype=torch.int8), False)

    def refused(message, targets=(), **arguments):
        model = Many()
        before = snapshot(model)
        with pytest.raises(LoRAInjectError, match=message):
            inject(model, targets, **arguments)
        assert changed_parts(before, snapshot(model)) == []

    refused("old: rows= is for embeddings and output heads", rows={"old": IDS})
    refused("conv: rows= is for embeddings", rows={"conv": IDS})
    refused("attention: rows= is for embeddings", rows={"attention": [1]})
    refused("lin: rows= is for embeddings", rows={"lin": [1]}, parts={"lin": ("q", None, "v")})
    refused("packed: rows= needs the values of its weight, which is packed", rows={"packed": IDS})
    refused(r"emb: rows: targets choose it too.*adapter of their own", "emb", rows={"emb": IDS})
    refused("rows: 'embed' matches nothing. Close names: emb", rows={"embed": IDS})
    refused("rows: 'emb' chooses nothing.*excluded", rows={"emb": IDS}, exclude="emb")
    refused("rows must be a mapping", rows=["emb"])
    refused(r"^rows\[''\] holds an empty string", rows={"": IDS})
    refused("selects only layers", rows={"emb": IDS, nn.Embedding: [1]})
    refused("targets is empty", rows={})
    refused("to be adapted and to train in full", rows={"emb": IDS}, train_also="emb")


def test_tied_places_have_the_same_rows_or_are_refused():
    with pytest.raises(ValueError, match="tied and share one adapter, but are given different"):
        inject(tied(), (), rows={"emb": IDS, "head": [1]})
    with pytest.raises(ValueError, match="tied and share one adapter, but are given different"):
        inject(tied(), "head", rows={"emb": IDS})
    model = tied()
    inject(model, (), rows={"emb": IDS, "head": IDS})
    assert model.head.lora_rows is model.emb.lora_rows
    model = tied()
    inject(model, (), rows={"emb": IDS}, exclude="head")  # leaves it with the table as it was
    assert not hasattr(model.head, "lora_rows")


def test_each_row_of_a_batch_may_have_rows_of_its_own():
    model = untied()
    inject(model, (), rows={"emb": IDS, "head": [3]}, adapter="one")
    inject(model, (), rows={"emb": [1], "head": [4, 8]}, adapter="two")
    use(model, "one", "two", train=("one", "two"))
    moved(model)
    expected = []
    for name, row in zip(("two", "one"), tokens(), strict=True):
        use(model, name)
        expected.append(model(row.unsqueeze(0)))
    with per_row(model, ["two", "one"]):
        torch.testing.assert_close(model(tokens()), torch.cat(expected))


def test_what_combines_factor_by_factor_refuses_rows():
    model = untied()
    inject(model, (), rows={"emb": IDS}, adapter="one")
    inject(model, (), rows={"emb": [1]}, adapter="two")
    use(model, "one", "two")
    with pytest.raises(LoRAInjectError, match=r"emb.*no product of low rank"):
        combine(model, {"one": 1.0, "two": 1.0}, "sum")


def test_other_ids_are_other_settings_of_a_state_dict():
    one, other = untied(), untied()
    inject(one, (), rows={"emb": [1, 2]})
    inject(other, (), rows={"emb": [1, 3]})
    with pytest.raises(ValueError, match=r"lora_rows is for rows 1, 2, and here for rows 1, 3"):
        load_lora_state_dict(other, lora_state_dict(one))
    with pytest.raises(ValueError, match=r"other settings.*lora_rows"):
        other.load_state_dict(one.state_dict())
