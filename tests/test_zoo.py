"""The zoo: what it builds is right, what is wrong is counted, and what crashes loses one class."""

import json
import os
import sys
import time

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.zoo import check as checking
from benchmarks.zoo import command as zoo
from benchmarks.zoo.check import check, comparable
from benchmarks.zoo.models import build, class_names
from lora_inject.core.layer import WholeLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # of models of all kinds
GOOD = {"dead": 0, "wrong": 0, "wrong after merge": 0, "wrong after strip": 0, "said": []}


def counts(name):
    found = check(comparable(build(name)))
    return {key: found[key] for key in GOOD}, found


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("MixtralModel", {"Linear", "Embedding", "parameter"}),
        ("GPT2LMHeadModel", {"Conv1D", "Embedding"}),
        ("ConvNextModel", {"Linear", "Conv"}),
        ("RwkvModel", {"Linear", "Embedding"}),
    ],
)
def test_every_pair_of_a_class_is_right(name, kinds):
    right, found = counts(name)
    assert right == GOOD
    assert found["kinds"].keys() == kinds
    assert found["pairs"] == sum(found["kinds"].values()) > found["idle"]


def test_dead_pairs_are_counted(monkeypatch):
    def bypassed(self, x):
        return torch.nn.functional.linear(x, self._parameters["weight"], self.bias)

    monkeypatch.setattr(WholeLayer, "forward", bypassed)
    wrong, found = counts("LlamaModel")
    assert wrong["wrong"] == found["pairs"]
    assert found["said"] == ["outputs differ from those of W + s B A"]


def test_what_merging_and_stripping_leave_is_counted(monkeypatch):
    def noisy(do):
        def done(module):
            do(module)
            with torch.no_grad():
                next(module.parameters()).add_(0.5)

        return done

    with monkeypatch.context() as patch:
        patch.setattr(checking, "strip", noisy(checking.strip))
        wrong, found = counts("LlamaModel")
        assert wrong == {**GOOD, "wrong after strip": found["pairs"], "said": found["said"]}
        assert found["said"] == ["strip left other values, outputs"]
    monkeypatch.setattr(checking, "merge", noisy(checking.merge))
    assert counts("LlamaModel")[0]["wrong after merge"] == found["pairs"]


def crash(connection):
    connection.recv()
    os._exit(1)


def sleep(connection):
    connection.recv()
    time.sleep(60)


def answer(connection):
    while True:
        connection.send({"said": [], "pairs": 1, "asked": connection.recv()})


def test_a_crash_and_a_class_that_takes_too_long_lose_one_class_each(monkeypatch):
    monkeypatch.setattr(zoo, "SECONDS", 250)  # for what a new process imports
    worker = zoo.Worker(crash)
    assert worker.check("One") == {"none": "its process ended"}
    worker.serve = answer
    assert worker.check("Two")["asked"] == "Two"
    worker.end()
    worker.serve = sleep
    monkeypatch.setattr(zoo, "SECONDS", 0.1)
    assert worker.check("Three") == {"none": "takes more than 0.1 seconds"}
    assert worker.process is None


def test_a_run_goes_on_where_it_was_left(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo.Worker, "check", lambda self, name: {"said": [], "pairs": len(name)})
    log = tmp_path / "log"
    zoo.measure(["A", "BB"], 2, log)
    monkeypatch.setattr(zoo.Worker, "check", lambda self, name: {"none": "KeyError: 'x'"})
    found = {one.pop("name"): one for one in zoo.measure(["A", "BB", "CCC"], 1, log)}
    assert found == {
        "A": {"said": [], "pairs": 1},
        "BB": {"said": [], "pairs": 2},
        "CCC": {"none": "KeyError: 'x'"},
    }
    assert len(log.read_text().splitlines()) == 3
    assert len(zoo.measure(["A", "DD"], 1, log, minutes=0)) == 3


def test_the_table_counts_what_is_wrong_and_why_classes_do_not_run():
    fine = {"name": "Fine", "said": [], "pairs": 3, "kinds": {"Linear": 3}, "idle": 1, **GOOD}
    bad = {**fine, "name": "Bad", "dead": 2, "said": ["inject changed an output"]}
    refused = {**fine, "name": "Router", "refused": {"it returns a tuple. Exclude it.": 2}}
    found = zoo.summary([fine, bad, refused, {"name": "None", "none": "KeyError: 'x'"}], 6)
    assert json.loads(json.dumps(found)) == found
    text = "\n".join(zoo.lines(found))
    assert "| 3 | 9 | 2 | 0 | 0 | 0 |" in text
    assert "- Bad: 2 dead; inject changed an output" in text
    assert "- 2 layers: it returns a tuple" in text
    assert "- 1: KeyError from its config, its making or its forward" in text
    assert "\n2 more classes" in text


def test_it_is_a_row_of_the_benchmarks_that_writes_when_it_is_whole(monkeypatch, capsys):
    written = []
    monkeypatch.setattr(command, "write", lambda *found: written.append(found[0]))
    monkeypatch.setattr(zoo, "measure", lambda names, *options: [])
    for arguments in (["--quick"], ["LlamaModel"], []):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "zoo", *arguments])
        command.main()
    assert written == ["zoo"]
    assert "## The zoo: 0 classes" in capsys.readouterr().out


def test_one_class_of_each_family_comes_first():
    names = class_names()
    assert len(names) == len(set(names)) > 1000
    assert names.index("LlamaModel") < names.index("LlamaForCausalLM")
