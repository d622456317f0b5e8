"""``python -m benchmarks zoo``: every class of transformers and timm that a small config can build.

All of its layers are adapted, and the pairs are counted that are dead, wrong, wrong after merge or
wrong after strip (``check.py``). Each class has a time limit and runs in a worker process, so
that a crash loses one class.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing as mp
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.progress import Progress

from benchmarks.harness import machine

SECONDS, MEMORY = 90, 10 * 2**30  # of a class
MANY = 60  # classes after which a worker is replaced, since it keeps what they have imported
QUICK = 8
BAD = ("dead", "wrong", "wrong after merge", "wrong after strip")


def measure(
    names: list[str], workers: int, log: Path | None, minutes: float = math.inf
) -> list[dict[str, Any]]:
    """Check classes in worker processes, under a progress bar.

    Args:
        names: the classes.
        workers: how many at once.
        log: a file of JSON lines to which each result is appended; what stands in it is not done
            again.
        minutes: no class is begun after these.

    Returns:
        For each class that was begun its name and its result, or why there is none.
    """
    done = (
        [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    )
    known = {found["name"] for found in done}
    todo = [name for name in names if name not in known]
    pool: SimpleQueue[Worker] = SimpleQueue()
    end = time.monotonic() + 60 * minutes
    for _ in range(workers):
        pool.put(Worker())

    def one(name: str) -> dict[str, Any] | None:
        if time.monotonic() > end:
            return None
        worker = pool.get()
        try:
            return {"name": name, **worker.check(name)}
        finally:
            pool.put(worker)

    with ThreadPoolExecutor(workers) as threads, Progress() as progress:
        for found in progress.track(threads.map(one, todo), total=len(todo), description="classes"):
            if found is None:
                continue
            done.append(found)
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    while not pool.empty():
        pool.get().end()
    return done


class Worker:
    """A process that checks classes, one after the other; it is started when it is needed.

    Args:
        serve: what it does.
    """

    def __init__(self, serve: Callable[[Connection], None] | None = None) -> None:
        self.serve = serve or _serve
        self.process: Any = None
        self.connection: Any = None
        self.checked = 0

    def check(self, name: str) -> dict[str, Any]:
        """The result of a class; where there is none, the reason under "none"."""
        if self.process is None:
            context = mp.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=self.serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
            self.checked = 0
        found: dict[str, Any] = {"none": f"takes more than {SECONDS} seconds"}
        try:
            self.connection.send(name)
            if self.connection.poll(SECONDS):
                found = self.connection.recv()
                self.checked += 1
            else:
                self.checked = MANY
        except (EOFError, ConnectionError):
            found, self.checked = {"none": "its process ended"}, MANY
        if self.checked >= MANY:
            self.end()
        return found

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection: Connection) -> None:
    """What a worker does: receive names, send results."""
    import torch
    from transformers import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        connection.send(_result(name))


def _result(name: str) -> dict[str, Any]:
    from benchmarks.zoo.check import check, comparable
    from benchmarks.zoo.models import build

    try:
        small = comparable(build(name))
    except Exception as error:
        return {"none": _said(error)}
    try:
        return check(small)
    except Exception as error:
        return {"said": [_said(error)], "pairs": 0}


def _said(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def summary(found: Iterable[dict[str, Any]], known: int) -> dict[str, Any]:
    """The counts of all classes, of so many that are known, as ``results.json`` keeps them."""
    found = list(found)
    ran = [one for one in found if "none" not in one]
    bad = {one["name"]: {k: one[k] for k in BAD if one.get(k)} for one in ran}
    kinds: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for one in ran:
        kinds.update(one.get("kinds", {}))
        for reason, count in one.get("refused", {}).items():
            refused[reason.split(". ")[0]] += count
    return {
        "machine": machine(),
        "versions": _versions(),
        "classes": len(ran),
        "left_out": known - len(found),
        "kinds": dict(kinds.most_common()),
        **{k: sum(one.get(k, 0) for one in ran) for k in ("pairs", "idle", *BAD)},
        "defects": {
            one["name"]: [*(f"{v} {k}" for k, v in bad[one["name"]].items()), *one["said"]]
            for one in ran
            if bad[one["name"]] or one["said"]
        },
        "refused": dict(refused.most_common()),
        "none": dict(Counter(_reason(one["none"]) for one in found if "none" in one).most_common()),
    }


_REASONS = {  # by words in what was said
    "library": "needs a library that is not installed",
    "seconds": "takes too long",
    "too many parameters": "its small config has too many parameters",
    "passes of it differ": "two forward passes of it differ",
    "not finite": "its outputs are not finite",
}


def _reason(text: str) -> str:
    """Why a class did not run, in words that many share."""
    for word, reason in _REASONS.items():
        if word in text:
            return reason
    kind, _, rest = text.partition(": ")
    return f"{kind} from its config, its making or its forward" if rest else text


def _versions() -> str:
    """The libraries whose classes were checked."""
    found = ["transformers", *(["timm"] if importlib.util.find_spec("timm") else [])]
    return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in found)


def lines(found: dict[str, Any]) -> list[str]:
    """The Markdown of the section."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items())
    return [
        f"## The zoo: {found['classes']:,} classes of {found['versions']}",
        "",
        "Written by `python -m benchmarks zoo`: every class that a small config can build and run, "
        "every layer adapted. Outputs and gradients are compared with those of the weights "
        "W + s B A, before and after merging; after a step of training and `strip`, everything is "
        "compared with what was before, bit for bit.",
        "",
        "| classes | pairs | dead | wrong | wrong after merge | wrong after strip |",
        "|---|---|---|---|---|---|",
        f"| {found['classes']:,} | {found['pairs']:,} | "
        + " | ".join(f"{found[name]:,}" for name in BAD)
        + " |",
        "",
        f"Pairs: {kinds}; {found['idle']:,} of them on layers without an influence on the output "
        "of these inputs. What merging refuses, as tied weights, goes on beside what is merged.",
        "",
        *([_left_out(found["left_out"])] if found["left_out"] else []),
        *(f"- {name}: {'; '.join(said)}" for name, said in found["defects"].items()),
        *([""] if found["defects"] else []),
        "Refused, by reason:" if found["refused"] else "",
        "",
        *(f"- {count:,} layers: {reason}" for reason, count in found["refused"].items()),
        "",
        "Classes that do not run here, by reason:",
        "",
        *(f"- {count:,}: {reason}" for reason, count in found["none"].items()),
    ]


def _left_out(count: int) -> str:
    return f"{count:,} more classes were left out, as the time was over.\n"


def main(arguments: list[str]) -> dict[str, Any] | None:
    """Check all classes and print the table.

    Returns:
        What is to be written into the results; None of a quick run or of some classes.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks zoo", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="CLASS", help="some classes, and nothing is written"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK} classes, and nothing is written"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no class after these"
    )
    parser.add_argument("--log", type=Path, help="a file of results, from which a run goes on")
    options = parser.parse_args(arguments)
    from benchmarks.zoo.models import class_names

    names = options.names or class_names()
    names = names[: QUICK if options.quick else None]
    done = measure(names, options.workers, options.log, options.minutes)
    found = summary([one for one in done if one["name"] in names], len(names))
    print("\n".join(lines(found)), file=sys.stdout)
    return None if options.quick or options.names else found


if __name__ == "__main__":
    main(sys.argv[1:])
