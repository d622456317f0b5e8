"""What takes long is said, in a file by a line now and then, and what is quick says nothing."""

import time

import pytest

from lora_inject.printing import progress
from lora_inject.printing.progress import doing, tracked

pytestmark = pytest.mark.cpu("nothing is computed")


def test_what_is_quick_prints_nothing(capsys):
    with doing("reading"):
        pass
    assert list(tracked(range(3), "training")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_line_comes_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.05)
    with doing("reading"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading ... 0 s"
    assert len(lines) >= 2


def test_items_are_counted(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    said = tracked(iter("ab"), "training", number=2, said=lambda item: f", loss {item}")
    assert list(said) == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training, loss a: 1 of 2", "training, loss b: 2 of 2"]
    assert list(tracked([1], "quiet", shown=False)) == [1]
    assert capsys.readouterr().err == ""


def test_an_error_ends_it(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PAUSE", 0.01)
    with pytest.raises(ValueError, match="mine"), doing("reading"):
        raise ValueError("mine")
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_in_a_terminal_it_moves(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_moves", lambda: True)
    with doing("reading"):
        pass
    assert list(tracked([1, 2], "training", said=lambda item: f" {item}")) == [1, 2]
    assert capsys.readouterr().out == ""
