"""How long the README's two commands take: wall and CPU time, alone and beside others at work."""

import os
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.harness import machine

COMMANDS = {
    "lora-inject demo": [sys.executable, "-m", "lora_inject", "demo"],
    "pytest": [sys.executable, "-m", "pytest", "-q"],
}
BUSY = [sys.executable, "-c", "while True: pass"]


def measure(command: str, beside: int) -> dict[str, Any]:
    """One run of a command beside as many processes that keep a core busy each."""
    load = os.getloadavg()[0]  # of what is there already
    busy = [subprocess.Popen(BUSY) for _ in range(beside)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    try:
        subprocess.run(COMMANDS[command], check=True)
        wall = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have ended
    finally:
        for process in busy:
            process.kill()
            process.wait()
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": command, "beside": beside, "load": load, "wall": wall, "cpu": used}


def main(arguments: list[str]) -> dict[str, Any]:
    """Measure the demo alone and beside four others for each core; ``tests`` alone, if asked."""
    runs = [measure("lora-inject demo", n * (os.cpu_count() or 1)) for n in (0, 4)]
    if "tests" in arguments:
        runs.append(measure("pytest", 0))
    return {"machine": machine(), "runs": runs}


def lines(found: dict[str, Any]) -> list[str]:
    """The section of RESULTS.md."""
    return [
        f"## The two commands, on {found['machine']}",
        "",
        "`python -m benchmarks commands tests`: CPU time is that of all threads and processes; the "
        "load average is that of the minute before, and tells whether the machine did something "
        "else.",
        "",
        "| command | beside | load average before | wall | CPU |",
        "|---|---|---|---|---|",
        *(
            f"| `{r['command']}` | {r['beside'] or 'no'} busy processes | {r['load']:.1f} | "
            f"{r['wall']:.0f} s | {r['cpu']:.0f} s |"
            for r in found["runs"]
        ),
    ]
