"""The demo on its real model and data: it learns, and the model it strips is the original."""

import pytest
import torch

from lora_inject import ArgumentError
from lora_inject.cli import demo
from lora_inject.cli.main import main

pytestmark = pytest.mark.cpu("it is slow")


@pytest.mark.usefixtures("demo_packages")
def test_the_lexicon_is_read_whole():
    model, training, held_out = demo.load()
    assert (len(training), len(held_out)) == (6217, 1000)
    assert sum(p.numel() for p in model.encoder.parameters()) == 22_713_216
    assert held_out.ratings.abs().max() <= 4


@pytest.mark.usefixtures("demo_packages")
def test_it_learns_and_strips(tmp_path, capsys, monkeypatch):
    whole = demo.load

    def few_words():
        model, training, held_out = whole()
        return model, training[:1600], held_out[:300]

    monkeypatch.setattr(demo, "load", few_words)
    measured = demo.run(epochs=1, seed=0, plot=tmp_path / "plot.png")
    assert measured["after"] > 0.4 > abs(measured["before"])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "37,249 of 22,750,465 parameters train" in out
    assert "all equal bit for bit" in out


def test_the_command_takes_one_thread_unless_the_user_says_otherwise(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(demo, "run", lambda **_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert main(["demo"]) == 0
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert main(["demo"]) == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 1]


def test_the_plotted_loss_is_a_mean_of_the_last_ones():
    losses = [float(i) for i in range(30)]
    smoothed = demo.smoothed(losses)
    assert smoothed[:2] == [0, 0.5]
    assert smoothed[-1] == sum(losses[-demo.SMOOTHED :]) / demo.SMOOTHED


def test_the_comparison_can_fail():
    model = torch.nn.Linear(2, 2)
    before = demo.snapshot(model)
    with torch.no_grad():
        model.weight[0, 0] += 1
    with pytest.raises(AssertionError, match="value weight"):
        demo.compare(before, demo.snapshot(model))
    model = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="parameter weight"):
        demo.compare(before | {f"value {k}": v for k, v in model.state_dict().items()},
                     demo.snapshot(model))  # fmt: skip


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="epochs"):
        demo.run(epochs=0)
