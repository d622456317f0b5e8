"""``python -m benchmarks [ROW ...]``: measure, and write RESULTS.md, results.json and the chart.

``python -m benchmarks gpu`` measures on a GPU (see ``benchmarks/gpu.py``), ``commands [tests]`` how
long the README's commands take, ``clients`` counts what other tools make of our files
(``clients.py``), and ``zoo`` adapts every class of transformers (``benchmarks/zoo`` says how).
"""

import argparse
import sys
from operator import itemgetter

from rich.progress import track

from benchmarks import (  # noqa: F401 (they register their rows)
    adapters,
    arithmetic,
    attention,
    clients,
    commands,
    compiled,
    control_plane,
    experts,
    gpu,
    memory,
    merging,
    quality,
    shared_input,
    variants,
)
from benchmarks.harness import REGISTRY, Result, as_section, write
from benchmarks.zoo import command as zoo

SECTIONS = {  # of RESULTS.md, after the CPU's
    "gpu": gpu.lines,
    "quality": quality.lines,
    "versions": itemgetter("lines"),  # by hand, of what .ci/matrix prints
    "commands": commands.lines,
    "clients": clients.lines,
    "zoo": zoo.lines,
}


def main() -> None:
    """Run rows on the CPU, the rows for a GPU, the quality benchmark, or the commands."""
    if sys.argv[1:2] == ["gpu"]:
        gpu.main(sys.argv[2:], publish=lambda found: write("gpu", found, SECTIONS))
        return
    if sys.argv[1:2] == ["clients"]:
        write("clients", clients.measure(sys.argv[2:]), SECTIONS)
        return
    if sys.argv[1:2] == ["commands"]:
        write("commands", commands.main(sys.argv[2:]), SECTIONS)
        return
    if sys.argv[1:2] == ["zoo"]:
        if found := zoo.main(sys.argv[2:]):
            write("zoo", found, SECTIONS)
        return
    options = _options()
    if options.rows == ["quality"]:
        found = quality.measure(options.quick)
        print("\n".join(quality.lines(found)))
        if not options.quick:
            quality.chart(found, quality.CHART)
            write("quality", found, SECTIONS)
        return
    results = measured(options.rows or list(REGISTRY), 3 if options.quick else 15)
    for r in results:
        met, limit = "met" if r.met else "NOT met", f", limit {r.limit}" if r.limit else ""
        print(f"{r.row:8} {r.workload}: {r.value} (goal {r.goal}, {met}{limit})")
    if not options.quick and not options.rows:
        write("cpu", as_section(results), SECTIONS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW",
        help="gpu, commands, zoo (an hour), quality (20 minutes), or some of those that are the "
        "default: " + ", ".join(REGISTRY),
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="3 rounds, and nothing is written")
    options = parser.parse_args()
    unknown = set(options.rows) - set(REGISTRY)
    if unknown and options.rows != ["quality"]:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(REGISTRY)}")
    return options


def measured(names: list[str], rounds: int) -> list[Result]:
    """The rows of these names."""
    return [
        result for name in track(names, "measuring") for result in REGISTRY[name].measure(rounds)
    ]


if __name__ == "__main__":
    main()
