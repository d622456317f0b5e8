"""Any tree of modules, any arguments: refused untouched, or adapted, trained and stripped exactly.

``--examples 5000`` looks longer.
"""

import copy

import pytest
import torch
from helpers import changed_parts, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from trees import NAMES, WIDTH, tree

from lora_inject import LoRAInjectError, inject, lora_parameters, plan, strip

pytestmark = pytest.mark.cpu("it is about trees, not values")


def arguments(random, model):
    """Arguments of inject, which may or may not fit the model."""
    paths = [path for path, _ in model.named_modules() if path] or ["a"]
    some = random.sample(paths, min(len(paths), random.randint(1, 3)))
    patterns = [
        *some,
        random.choice(NAMES),
        "*",
        "*proj*",
        "re:.*",
        nn.Linear,
        nn.MultiheadAttention,
    ]
    targets = random.choice(["all-linear", nn.Linear, some, random.sample(patterns, 2), "re:.*"])
    return {
        "targets": targets,
        "r": random.randint(1, 3),
        "alpha": random.choice([None, 0.5, 4]),
        "dropout": random.choice([0.0, 0.0, 0.3]),
        "bias": random.choice(["none", "none", "all", "lora_only"]),
        "train_also": random.choice([(), (), (), some[:1]]),
        "exclude": random.choice([(), (), (), random.choice(paths)]),
        "layers": random.choice([None, None, None, 0, -1]),
        "variant": random.choice(["lora", "lora", "lora", "dora", "loha"]),
        "how": random.choice(["auto", "auto", "weight"]),
        "seed": random.choice([None, 3]),
    }


def train(model, x):
    optimizer = torch.optim.Adam(lora_parameters(model), lr=0.05)
    for _ in range(2):
        loss = model(x).square().mean()
        if loss.requires_grad:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def attempt(random):
    model, x = tree(random), torch.randn(3, WIDTH)
    y, before = model(x), snapshot(model)
    given = arguments(random, model)
    try:
        plan(model, **given)
    except LoRAInjectError:
        assert changed_parts(before, snapshot(model)) == []
        with pytest.raises(LoRAInjectError):
            inject(model, **given)
        assert changed_parts(before, snapshot(model)) == []
        return
    assert changed_parts(before, snapshot(model)) == []
    inject(model, **given)
    if given["variant"] == "lora":  # of a weight that is computed, the last bit may differ
        assert torch.equal(model(x), y)
    train(model, x)
    if random.random() < 0.5:
        strip(copy.deepcopy(model))
    strip(model)
    assert changed_parts(before, snapshot(model)) in ([], ["gradients"])  # dropped by freezing
    assert torch.equal(model(x), y)


@pytest.mark.filterwarnings("ignore")
@given(random=st.randoms(use_true_random=False))
def test_any_tree_comes_back_as_it_was(random):
    torch.manual_seed(0)
    attempt(random)
