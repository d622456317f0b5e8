"""``python -m benchmarks [ROW ...]``: measure, and write RESULTS.md, results.json and the chart."""

import argparse

from rich.progress import track

from benchmarks import (  # noqa: F401 (they register their rows)
    adapters,
    arithmetic,
    compiled,
    control_plane,
    memory,
    merging,
    quality,
)
from benchmarks.harness import REGISTRY, Result, as_section, write


def main() -> None:
    """Run rows of one device, or the quality benchmark."""
    options = _options()
    if options.rows == ["quality"]:
        found = quality.measure(options.quick)
        print("\n".join(quality.lines(found)))
        if not options.quick:
            quality.chart(found, quality.CHART)
            write("quality", found, quality.lines)
        return
    results = measured(options.rows or list(REGISTRY), options.device, 3 if options.quick else 15)
    for r in results:
        met = {True: "met", False: "NOT met", None: "not run"}[r.met]
        print(f"{r.row:8} {r.workload}: {r.value} (goal {r.goal}, {met})")
    if not options.quick and not options.rows:
        write(options.device, as_section(results), quality.lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW",
        help=f"quality (6 minutes), or some of {', '.join(REGISTRY)}; default: all but quality",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="3 rounds, and nothing is written")
    options = parser.parse_args()
    unknown = set(options.rows) - set(REGISTRY)
    if unknown and options.rows != ["quality"]:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(REGISTRY)}")
    return options


def measured(names: list[str], device: str, rounds: int) -> list[Result]:
    """The rows of these names; without a GPU, those that need one say so in their place."""
    wanted = [name for name in names if device == "cpu" or REGISTRY[name].device == device]
    return [
        result for name in track(wanted, "measuring") for result in REGISTRY[name].measure(rounds)
    ]


if __name__ == "__main__":
    main()
