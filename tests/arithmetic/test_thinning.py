"""Rank dropout and module dropout: left out for one call in training, and nowhere else."""

import copy
import json

import pytest
import torch
from helpers import Net, randomize_adapters
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_inject import FormatError, inject, load, merge, per_row, plan, save, strip, unmerge
from lora_inject.core.state import adapters_of

pytestmark = pytest.mark.usefixtures("device")
LAYERS = {
    "Linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(4, 6)),
    "large Linear": (lambda: nn.Linear(256, 128), lambda: torch.randn(256, 256)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: torch.randn(2, 4, 5, 5)),
    "Embedding": (lambda: nn.Embedding(9, 4), lambda: torch.tensor([1, 2, 8])),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
METHODS = [{}, {"init": "pissa"}, {"variant": "dora"}, {"variant": "dora", "init": "olora"}]
SUBSETS = [{rank for rank in range(3) if mask >> rank & 1} for mask in range(8)]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def made(name, dropout, seed=0, **method):
    torch.manual_seed(0)
    build, make_input = LAYERS[name]
    model, x = nn.Sequential(build()), make_input()
    base = copy.deepcopy(model)
    inject(model, "0", r=3, alpha=6, dropout=dropout, seed=seed, **method)
    randomize_adapters(model)
    return model, base, x


def without(model, left_out):
    """The model with columns of B, and of its start, that are zero or count twice."""
    twin = copy.deepcopy(model).eval()
    keep = torch.tensor([0.0 if rank in left_out else 2.0 for rank in range(3)])
    with torch.no_grad():
        for name in ("lora_B", "lora_B0"):
            if hasattr(twin[0], name):
                B = getattr(twin[0], name)
                B.mul_(keep.reshape(-1, *(1,) * (B.dim() - 2)))
    return twin


@every_method
@every_layer
def test_some_ranks_are_left_out_in_training_and_the_others_count_more(name, method):
    model, _, x = made(name, {"rank": 0.5}, **method)
    possible = [without(model, left_out)(x) for left_out in SUBSETS]
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        y = model(x)
        near = [torch.allclose(y, other, rtol=1e-4, atol=1e-5) for other in possible]
        assert any(near)
        seen.add(near.index(True))
    assert len(seen) > 3
    model.eval()
    whole = copy.deepcopy(model)
    assert torch.equal(model(x), whole(x))
    assert not any(torch.allclose(model(x), other) for other in possible[:-1])


@every_method
@every_layer
def test_a_whole_adapter_is_there_or_not(name, method):
    model, base, x = made(name, {"module": 0.5}, **method)
    there, seen = copy.deepcopy(model).eval()(x), set()
    for seed in range(20):
        torch.manual_seed(seed)
        y = model(x)
        if torch.allclose(y, base(x), rtol=1e-5, atol=1e-6):
            seen.add("base")
        else:
            torch.testing.assert_close(y, there, rtol=1e-4, atol=1e-5)
            seen.add("adapter")
    assert seen == {"base", "adapter"}


@every_method
def test_a_fresh_adapter_changes_nothing_in_training_either(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    expected = copy.deepcopy(model).requires_grad_(False)(x)
    inject(model, "0", r=3, dropout={"rank": 0.5, "module": 0.3}, **method)
    for _ in range(5):
        assert torch.equal(model(x), expected)


def test_gradients_are_those_of_what_ran():
    model, _, x = made("Linear", {"rank": 0.5, "module": 0.2})
    x.requires_grad_()
    own = list(model[0].parameters())[2:]

    def gradients(run):
        torch.manual_seed(3)
        return torch.autograd.grad(run(x).square().sum(), [x, *own])

    direct = gradients(model)
    again = gradients(lambda x: checkpoint(model, x, use_reentrant=False))
    for one, other in zip(direct, again, strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(3)
    assert torch.autograd.gradcheck(_seeded(model.double()), x.detach().double().requires_grad_())


def _seeded(model):
    def run(x):
        torch.manual_seed(3)
        return model(x)

    return run


def test_merging_and_stripping_know_nothing_of_it():
    model, base, x = made("Linear", {"rank": 0.5, "module": 0.5})
    expected = copy.deepcopy(model).eval()(x)
    merge(model)
    torch.testing.assert_close(model.train()(x), expected)
    unmerge(model)
    assert torch.equal(strip(model)(x), base(x))


def test_each_adapter_of_a_batch_is_thinned_in_training():
    model, base, x = made("Linear", {"module": 0.5})
    there, seen = copy.deepcopy(model).eval()(x), set()
    for seed in range(10):
        torch.manual_seed(seed)
        with per_row(model, ["default", None, "default", None]):
            y = model(x)
        torch.testing.assert_close(y[1::2], base(x)[1::2])
        is_there = torch.allclose(y[::2], there[::2], rtol=1e-4, atol=1e-5)
        assert is_there or torch.allclose(y[::2], base(x)[::2], rtol=1e-4, atol=1e-5)
        seen.add(is_there)
    assert seen == {True, False}
    with per_row(model.eval(), ["default"] * 4):
        torch.testing.assert_close(model(x), there)


def test_compiled_in_one_graph_it_draws_anew_in_each_call():
    model, _, x = made("Linear", {"rank": 0.5, "module": 0.2})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    possible = [without(model, left_out)(x) for left_out in SUBSETS]
    seen = set()
    for _ in range(10):
        y = compiled(x)
        near = [torch.allclose(y, other, rtol=1e-4, atol=1e-5) for other in possible]
        seen.add(near.index(True))
    assert len(seen) > 1


def test_settings_are_shown_travel_in_files_and_are_checked(tmp_path):
    model = Net()
    dropout = {"input": 0.1, "rank": 0.2, "module": 0.3}
    targets = {"q_proj": {"dropout": dropout}, "v_proj": {}}
    made = plan(model, targets, r=2)
    assert made.sites[0].settings.drops.text == ", rank dropout 0.2, module dropout 0.3"
    assert "rank" in str(made)
    inject(model, targets, r=2)
    assert "rank dropout 0.2" in repr(model.layers[0].q_proj)
    save(model, tmp_path / "a")
    again = Net()
    load(again, tmp_path / "a", other_base=True)
    for name in ("q_proj", "v_proj"):
        first, other = (adapters_of(getattr(m.layers[0], name))[0] for m in (model, again))
        assert other.settings == first.settings
    for wrong in ({"rank": 1.0}, {"ranks": 0.1}, {"module": -0.1}, {"input": "0.1"}):
        with pytest.raises(ValueError, match="dropout must be a"):
            inject(Net(), "q_proj", dropout=wrong)
    with pytest.raises(ValueError, match=r"in its weight, where there is no call to leave ranks"):
        inject(Net(), "q_proj", how="weight", dropout={"rank": 0.1})


def test_metadata_that_cannot_be_is_refused(tmp_path):
    model = Net()
    inject(model, "q_proj", r=2, dropout={"rank": 0.2})
    save(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    own = json.loads(metadata["lora_inject"])
    assert own["drops"] == {f"layers.{i}.q_proj": [0.2, 0.0] for i in range(2)}
    for wrong in (5, [0.1], [0.1, 1.0], [0.1, "x"], {"rank": 0.1}):
        drops = {"layers.0.q_proj": wrong}
        told = {**metadata, "lora_inject": json.dumps({**own, "drops": drops})}
        save_file(tensors, file, told)
        with pytest.raises(FormatError, match="its metadata cannot be read"):
            load(Net(), tmp_path / "a", other_base=True)
