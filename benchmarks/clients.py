"""``python -m benchmarks clients``: what other tools make of our files, and we of theirs.

A run of the tests that say which client they are about:

    @pytest.mark.client("diffusers")                        its own code, as it is installed
    @pytest.mark.client("ComfyUI", rule="0.38")             its rule, written down in the test
    @pytest.mark.client("vLLM", "refused", rule="0.33")     refused, by it or by us, with a reason
    @pytest.mark.client("A1111", "otherwise", rule="1.10")  read as something else: we warn

What passes counts as the outcome that it says; ``what=`` says it in words, for what is not equal.
Engines are no part of the test extra. For their rows install vLLM and SGLang without what they
depend on (``pip install --no-deps vllm sglang``, and what their imports miss), let ``$LLAMA_CPP``
be a directory with the source of llama.cpp, and run ``clients tests/files/test_engines.py``: rows
of other clients stay.
"""

import importlib.metadata
import json
import os
import re
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.harness import DATA

TESTS = Path(__file__).parent.parent / "tests"
OUTCOMES = ("equal", "refused", "otherwise", "failed", "not run")


class Collector:
    """What came of the tests about each client, as a plugin of pytest."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Counter[str]] = {}
        self.notes: dict[tuple[str, str], list[str]] = {}
        self._marks: dict[str, list[Any]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Note which clients the tests are about."""
        for item in items:
            self._marks[item.nodeid] = [*item.iter_markers("client")]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test that has ended."""
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        for mark in self._marks[report.nodeid]:
            name, said = mark.args[0], mark.args[1] if mark.args[1:] else "equal"
            client = name, version_of(name, mark.kwargs.get("rule"))
            outcome = {"passed": said, "skipped": "not run"}.get(report.outcome, "failed")
            self.found.setdefault(client, Counter())[outcome] += 1
            if outcome not in ("equal", "refused"):
                what = mark.kwargs.get("what") or report.nodeid.rpartition("::")[2]
                self.notes.setdefault(client, []).append(f"{outcome}: {what.replace('_', ' ')}")


def version_of(client: str, rule: str | None) -> str:
    """Which version was asked."""
    if rule is not None:
        return f"{rule}, its rule"
    try:
        return importlib.metadata.version(client)
    except importlib.metadata.PackageNotFoundError:
        source = os.environ.get(client.upper().replace(".", "_"))
        if source is None:
            return "not installed"
        project = (Path(source) / "gguf-py" / "pyproject.toml").read_text()
        return "its source, with gguf " + re.findall(r'(?m)^version = "(.+)"', project)[0]


def measure(paths: list[str]) -> dict[str, Any]:
    """Run the tests of clients, and count: of some files alone, in place of their clients' rows."""
    import pytest

    collector = Collector()
    options = ["-m", "client", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent)]
    pytest.main([*options, *(paths or [str(TESTS)])], plugins=[collector])
    rows = [
        {
            "client": client,
            "version": version,
            "cases": {name: found[name] for name in OUTCOMES if found[name]},
            "notes": sorted(set(collector.notes.get((client, version), []))),
        }
        for (client, version), found in collector.found.items()
    ]
    if paths:
        asked = {row["client"] for row in rows}
        former = json.loads(DATA.read_text()).get("clients", {"rows": []})["rows"]
        rows += [row for row in former if row["client"] not in asked]
    return {"rows": sorted(rows, key=itemgetter("client", "version"))}


def lines(found: dict[str, Any]) -> list[str]:
    """The section of RESULTS.md."""
    rows = [
        f"| {row['client']} | {row['version']} | "
        + " | ".join(str(row["cases"].get(name, 0)) for name in OUTCOMES)
        + " |"
        for row in found["rows"]
    ]
    notes = [f"- {row['client']}, {note}" for row in found["rows"] for note in row["notes"]]
    return [
        "## Compatibility",
        "",
        "Written by `python -m benchmarks clients`, a run of the tests that are marked so: files "
        'of ours in the client, and the client\'s in here. "Its rule" is what its code computes '
        "and which names it knows, written down in the tests, where it is not installed. Equal: "
        "the same update of every weight; refused: with the reason, or it fails; otherwise: read "
        "as something else, of which a warning tells. vLLM, SGLang and llama.cpp are asked by "
        "their own readers of adapters, for layers that are listed by hand: no model of theirs "
        "is built, and nothing is served.",
        "",
        f"| client | version | {' | '.join(OUTCOMES)} |",
        f"|---|---|{'---|' * len(OUTCOMES)}",
        *rows,
        *(["", "What is not equal and not refused:", "", *notes] if notes else []),
    ]
