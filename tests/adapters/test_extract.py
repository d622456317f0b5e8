"""extract: an adapter out of the difference of two models."""

import copy

import pytest
import torch
from helpers import Net, changed_parts, ids, randomize_adapters, snapshot
from stored_models import Experts, Nested, Tied
from torch import nn

from lora_inject import ArgumentError, NoMatchError, extract, inject, merged, strip

pytestmark = pytest.mark.usefixtures("device")

LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "embedding": lambda: nn.Embedding(9, 5),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "attention": lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=5),
    "lstm": lambda: nn.LSTM(4, 5),
    "experts": lambda: Experts(True),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_difference_of_low_rank_comes_back_whole(kind):
    torch.manual_seed(0)
    base = Nested(LAYERS[kind]()).double()
    targets = ["b.up", "b.down"] if kind == "experts" else "a.b"
    tuned = copy.deepcopy(base)
    inject(tuned, targets, r=2, alpha=3)
    randomize_adapters(tuned)
    strip(tuned, merge=True)
    before = snapshot(base)
    result = extract(base, tuned, targets, r=2)
    assert result.worst < 1e-9
    assert result.others == ()
    with merged(base):
        for (name, a), b in zip(tuned.named_parameters(), _base_parameters(base), strict=True):
            torch.testing.assert_close(a, b, msg=name)
    strip(base)
    assert changed_parts(before, snapshot(base)) == []


def _base_parameters(model):
    return [p for name, p in model.named_parameters() if "lora_" not in name]


def test_what_is_lost_is_what_the_best_of_this_rank_loses():
    torch.manual_seed(0)
    base, tuned = (nn.Sequential(nn.Linear(60, 50)) for _ in range(2))
    values = torch.linalg.svdvals((tuned[0].weight - base[0].weight).double())
    state = torch.get_rng_state()
    result = extract(base, tuned, "0", r=8)
    assert torch.equal(torch.get_rng_state(), state)
    best = values[8:].norm().item() / values.norm().item()
    assert result.worst == pytest.approx(best, rel=0.02)
    assert result.others == ("0.bias",)
    assert "0.weight" in str(result)
    assert "Differ too" in str(result)
    first = base[0].lora_A.clone()
    strip(base)
    extract(base, tuned, "0", r=8)
    assert torch.equal(base[0].lora_A, first)


def test_equal_models_and_ranks_above_the_shape():
    base = Net()
    result = extract(base, copy.deepcopy(base), r=32, exclude="head")
    assert result.worst == 0.0
    x = ids()
    strip(base)
    tuned = Net()
    extract(base, tuned, ["embed", "head", "q_proj", "k_proj", "v_proj", "o_proj"], r=32)
    tuned.load_state_dict({**tuned.state_dict(), **{
        k: v for k, v in base.state_dict().items() if "bias" in k or "norm" in k}})  # fmt: skip
    torch.testing.assert_close(base(x), tuned(x), atol=1e-4, rtol=1e-4)


def test_models_that_do_not_belong_together_are_refused():
    base = Net()
    before = snapshot(base)
    with pytest.raises(ArgumentError, match=r"q_proj: tuned: its weight .* \(9, 9\), not \(8, 8\)"):
        extract(base, Net(dim=9), "q_proj")
    with pytest.raises(ArgumentError, match="no such module"):
        extract(base, nn.Linear(2, 2), "q_proj")
    with pytest.raises(NoMatchError):
        extract(base, Net(), "nothing")
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ArgumentError, match="no values"):
        extract(base, empty, "q_proj")
    assert changed_parts(before, snapshot(base)) == []


def test_extract_sees_adapters_and_ties():
    base, tuned = (nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(2))
    for model in (base, tuned):
        inject(model, "0", r=2)
        with pytest.raises(ArgumentError, match="adapters in use"):
            extract(base, tuned, "0", r=2)
        strip(model)
    tied, untied = Tied(), Tied()
    untied.head.weight = nn.Parameter(torch.randn(9, 4))
    assert extract(tied, untied, "emb", r=4).others == ("head.weight",)
    assert extract(Tied(), Tied(), "emb", r=4).others == ()
    with torch.no_grad():
        tuned[0].weight.fill_(float("inf"))
    with pytest.raises(ArgumentError, match="not finite"):
        extract(base, tuned, "0", r=2)
    with torch.no_grad():
        tuned[0].weight.copy_(torch.randn(4, 4) * 1e38)
    with pytest.raises(ArgumentError, match="too large"):
        extract(base, tuned, "0", r=2)
    half, other = (nn.Sequential(nn.Linear(32, 32)).bfloat16() for _ in range(2))
    assert extract(half, other, "0", r=32, dtype="base").worst > 1e-4  # bfloat16 loses as much


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_holds_the_lengths_of_rows_exactly_and_loses_less(kind):
    torch.manual_seed(0)
    base = Nested(LAYERS[kind]()).double()
    targets = ["b.up", "b.down"] if kind == "experts" else "a.b"
    tuned = copy.deepcopy(base)
    inject(tuned, targets, r=1, alpha=2, variant="dora")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                noise = 0.3 * torch.randn_like(parameter)
                parameter.mul_(1 + noise) if "magnitude" in name else parameter.add_(noise)
    strip(tuned, merge=True)
    before, plain = snapshot(base), copy.deepcopy(base)
    result = extract(base, tuned, targets, r=2, variant="dora")
    with merged(base):
        far = sum((a - b).norm() for a, b in zip(
            tuned.parameters(), _base_parameters(base), strict=True))  # fmt: skip
    start = sum((a - b).norm() for a, b in zip(tuned.parameters(), plain.parameters(), strict=True))
    assert far < start
    assert result.worst <= extract(plain, tuned, targets, r=2).worst + 1e-9
    strip(base)
    assert changed_parts(before, snapshot(base)) == []
    rows = nn.Sequential(nn.Linear(6, 5))
    longer = copy.deepcopy(rows)
    with torch.no_grad():
        longer[0].weight.mul_(torch.tensor([[1.0], [2.0], [0.5], [3.0], [1.5]]))
    assert extract(rows, longer, "0", r=1, variant="dora").worst < 1e-6


@pytest.mark.parametrize("rank", [2, 6, 24])
def test_dora_never_loses_more_than_lora_of_the_same_rank(rank):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32)).double()
    for difference in (torch.randn(32, 2) @ torch.randn(2, 24), torch.randn(32, 24)):
        for zero in (False, True):
            tuned = copy.deepcopy(base)
            with torch.no_grad():
                tuned[0].weight.add_(0.05 * difference)
                tuned[0].weight[3].mul_(0.0 if zero else 1.0)
            lora, dora = (
                extract(copy.deepcopy(base), tuned, "0", r=rank, variant=variant).worst
                for variant in ("lora", "dora")
            )
            assert dora <= lora + 1e-9
