"""The quality benchmark in small: our losses and PEFT's coincide, and what was found is shown."""

import json

import pytest
import torch
import transformers as tf
from helpers import PEFT_WARNS
from rich.progress import Progress

from benchmarks import quality
from benchmarks.methods import IN_PEFT, PEFT
from lora_inject.cli import demo

pytestmark = [PEFT_WARNS, pytest.mark.cpu("it is slow")]


@pytest.fixture
def _small_batches(monkeypatch):
    monkeypatch.setattr(demo, "BATCH", 16)


def compared(steps, dtype=torch.float32, method="LoRA"):
    model, words, _ = quality.start(seed=0)
    words = demo.Words(words.ids, words.mask, words.ratings.to(dtype))
    return quality.compare(model.to(dtype), words, method, steps, Progress(disable=True))


@pytest.mark.usefixtures("_small_batches", "demo_packages")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_minilm_learns_the_same_with_peft(dtype, bound):
    curves = compared(steps=6, dtype=dtype)
    assert len(curves["ours"]) == len(curves["peft"]) == 6
    assert len(set(curves["ours"])) == 6
    assert curves["max_difference"] <= bound
    assert curves["met"]


@pytest.mark.usefixtures("_small_batches", "demo_packages")
@pytest.mark.parametrize("method", [name for name in IN_PEFT if name != "LoRA"])
def test_minilm_learns_the_same_with_every_method_that_peft_has(method):
    moved = method in ("PiSSA", "OLoRA")  # which PEFT has in float32 alone, and rounds the base
    curves = compared(steps=6, dtype=torch.float32 if moved else torch.float64, method=method)
    assert len(set(curves["ours"])) == 6
    assert curves["max_difference"] <= (2e-5 if moved else 1e-6)


@pytest.mark.usefixtures("_small_batches", "demo_packages")
def test_another_scaling_would_be_seen(monkeypatch):
    twins = quality.twins

    def unlike(*args):
        ours, theirs = twins(*args)
        for module in theirs.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 1.1
        return ours, theirs

    monkeypatch.setattr(quality, "twins", unlike)
    assert not compared(steps=6)["met"]


def test_peak_counts_what_is_held_at_once():
    def action():
        kept = torch.ones(1000)
        for _ in range(3):
            passing = torch.ones(500)
            del passing
        return kept

    assert 6000 <= quality.peak(action) < 7000


def test_everything_is_measured_and_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load", small)
    threads = torch.get_num_threads()
    found = json.loads(json.dumps(quality.measure(quick=True)))
    assert torch.get_num_threads() == threads
    assert all(own["met"] for own in found["curves"].values())
    by_name = {m["method"]: m for m in found["methods"]}
    trainable = {name: m["trainable"] for name, m in by_name.items()}
    theirs = {name: n for name, n in trainable.items() if name.endswith(PEFT)}
    assert theirs == {name: trainable[name.removesuffix(PEFT)] for name in theirs}
    assert len(theirs) == 6
    assert {name: n for name, n in trainable.items() if name not in theirs} == {
        "head only": 17,
        "LoRA r=1": 17 + 2 * 2 * 32,
        "LoRA r=4": 17 + 4 * 2 * 2 * 32,
        "LoRA r=16": 17 + 16 * 2 * 2 * 32,
        "rsLoRA r=16": 17 + 16 * 2 * 2 * 32,
        "LoRA-FA r=4": 17 + 4 * 2 * 32,
        "DoRA r=4": 17 + 4 * 2 * 2 * 32 + 2 * 32,
        "PiSSA r=4": 17 + 4 * 2 * 2 * 32,
        "EVA r=4 on average": 17 + 4 * 2 * 2 * 32,
        "full fine-tuning": sum(p.numel() for p in small()[0].parameters()),
    }
    growing = ["head only", *(f"LoRA r={r}" for r in (1, 4, 16)), "full fine-tuning"]
    peaks = [by_name[name]["peak_mb"] for name in growing]
    assert peaks == sorted(peaks)
    section = quality.lines(found)
    assert section[0] == "## Quality: MiniLM on the VADER words"
    table = [line for line in section if line.startswith("|")]
    assert len(table) == 2 + 10 + 6
    assert len({line.count("|") for line in table}) == 1
    assert "Ours and PEFT coincide" in "\n".join(section)
    quality.chart(found, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def small():
    """A little BERT with new weights, and words to be learned, in place of what the demo loads."""
    config = tf.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2,
                           num_attention_heads=4, intermediate_size=24)  # fmt: skip
    model = demo.Rater(tf.BertModel(config), 16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (800, 5), generator=generator)
    words = demo.Words(ids, torch.ones_like(ids), ids.float().mean(1) / 32 - 1)
    return model, words[:700], words[700:]
