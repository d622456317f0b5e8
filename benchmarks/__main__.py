"""``python -m benchmarks [ROW ...] [--quick]``: measure, and write RESULTS.md and results.json."""

import argparse

from rich.progress import track

from benchmarks import adapters, control_plane, merging  # noqa: F401 (they register their rows)
from benchmarks.harness import REGISTRY, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {list(REGISTRY)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and nothing is written")
    options = parser.parse_args()
    unknown = set(options.rows) - set(REGISTRY)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(REGISTRY)}")
    rounds = 3 if options.quick else 15
    names = options.rows or list(REGISTRY)
    results = [
        result for name in track(names, "measuring") for result in REGISTRY[name].measure(rounds)
    ]
    for r in results:
        print(f"{r.row:8} {r.workload}: {r.value} (goal {r.goal}, {'met' if r.met else 'NOT met'})")
    if not options.quick and not options.rows:
        write(results, "python -m benchmarks")


if __name__ == "__main__":
    main()
