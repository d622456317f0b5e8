"""Where the rows for a GPU are measured and how thoroughly; on the CPU they run at tiny sizes."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.harness import Action, Clock, Result, Timings, event_seconds, interleaved, seconds
from benchmarks.limits import Ceilings

T = TypeVar("T")
Around = Mapping[str, Callable[[], AbstractContextManager[object]]]  # in what an action runs
BF16 = torch.bfloat16
PEERS = ("PEFT", "eager")


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward pass, beyond those before it.

    Attributes:
        kept: what stands after the forward pass, its output left out.
        peak: the most at any time.
    """

    kept: int
    peak: int


@dataclass(frozen=True)
class Bench:
    """A device, its ceilings, and whether everything is small: to see that it runs."""

    device: str
    quick: bool
    ceilings: Ceilings

    @property
    def is_gpu(self) -> bool:
        """Whether there are events, graphs and counted memory."""
        return self.device == "cuda"

    @property
    def clock(self) -> Clock:
        """What times actions."""
        return event_seconds if self.is_gpu else seconds

    def pick(self, full: T, quick: T) -> T:
        """One of two values: the real one, or that of a quick run."""
        return quick if self.quick else full

    def timed(
        self,
        actions: Mapping[str, Action],
        repeats: int,
        within: float = 3.0,
        around: Around | None = None,
        rounds: int = 30,
    ) -> Timings:
        """Time actions in turns, for about as long as ``within`` says."""
        if self.quick:
            rounds, repeats = 2, 1
        return interleaved(actions, rounds, repeats, clock=self.clock, within=within, around=around)

    def graphed(self, actions: Mapping[str, Action]) -> dict[str, Action]:
        """The actions as CUDA graphs, of which a CPU has none."""
        return {
            name: Graphed(action) if self.is_gpu else action for name, action in actions.items()
        }

    def random(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """Normal random values."""
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def pairs(self, *shape: int, sets: int = 4) -> list[tuple[Tensor, Tensor]]:
        """Inputs and gradients of outputs; several sets, so that no cache holds them all."""
        return [
            (self.random(*shape).requires_grad_(), self.random(*shape))
            for _ in range(self.pick(sets, 2))
        ]

    def memory(
        self, model: nn.Module, call: Callable[[Tensor], Tensor], pair: tuple[Tensor, Tensor]
    ) -> Memory | None:
        """Count the bytes of a forward and a backward pass; None where nobody counts them.

        Args:
            model: whose gradients are dropped before.
            call: runs the model.
            pair: an input and a gradient of the output.
        """
        if not self.is_gpu:
            return None
        (x, g), leaves = pair, [pair[0], *model.parameters()]
        for _ in range(2):  # what is made at the first use does not count
            for leaf in leaves:
                leaf.grad = None
            self.collect()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = call(x)
            kept = torch.cuda.memory_allocated() - before - y.nbytes
            y.backward(g)
            del y
        return Memory(kept, torch.cuda.max_memory_allocated() - before)

    def collect(self) -> None:
        """Give back what nobody needs any more."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


class Graphed:
    """An action as a CUDA graph, recorded at its first call: launches cost almost nothing then."""

    def __init__(self, action: Action) -> None:
        self.action, self.graph = action, None

    def __call__(self) -> None:
        """Play the graph."""
        if self.graph is None:
            self.graph, self.held = self._recorded()
        self.graph.replay()

    def _recorded(self) -> tuple[torch.cuda.CUDAGraph, object]:
        """The graph, and what must not be freed while it is there."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.action()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = self.action()
        return graph, held


class Failing(nn.Module):
    """Stands for a model that could not be made; it raises what that raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Raise it."""
        raise self.error


def attempted(make: Callable[[], nn.Module]) -> nn.Module:
    """A peer's model, or what stands for one that could not be made."""
    try:
        return make()
    except Exception as error:
        return Failing(error)


def working(
    steps: Mapping[str, Action], around: Around | None = None
) -> tuple[dict[str, Action], list[str]]:
    """The steps without those of peers that fail, and what is to be said of them."""
    found, failures = {}, []
    for name, step in steps.items():
        try:
            with (around or {}).get(name, nullcontext)():
                step()
        except Exception as error:
            if not name.startswith(PEERS):
                raise
            text = (str(error).splitlines() or [""])[0][:100]
            failures.append(f"{name} cannot: {type(error).__name__}: {text}")
        else:
            found[name] = step
    return found, failures


def described(timings: Timings, floor: str = "floor") -> str:
    """Every action as a multiple of the floor, with its quartiles, and the floor in ms."""
    shown = []
    for name, ratio in timings.over(floor).items():
        low, high = timings.spread(name, floor)
        shown.append(f"{name} {ratio:.3f}x ({low:.3f} to {high:.3f})")
    rounds = len(timings.rounds[floor])
    return f"{', '.join(shown)}; {floor} {ms(timings.seconds(floor))}, {rounds} rounds"


def shown(memory: Mapping[str, Memory | None]) -> str:
    """What is kept by each model, and the peaks."""
    counted = [f"{name} {mib(m.kept)} / {mib(m.peak)}" for name, m in memory.items() if m]
    return f"kept / peak: {', '.join(counted) or 'not counted on this device'}"


def ms(taken: float) -> str:
    """Seconds in words, as milliseconds."""
    return f"{1e3 * taken:.3g} ms"


def mib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**20:,.0f} MiB"


def against(
    row: str,
    workload: str,
    timings: Timings,
    most: float,
    *,
    floor: str = "floor",
    extra: float = math.nan,
    fused: float = math.nan,
    notes: Iterable[str] = (),
) -> Result:
    """A line of a row whose goal is a multiple of the floor's time.

    Args:
        row: the row.
        workload: what is done.
        timings: among them of "ours" and the floor.
        most: the goal.
        floor: what is divided by.
        extra: the seconds that ours takes beyond the floor at least, for the limit.
        fused: the same, were additions fused into the floor's own products.
        notes: what else there is to say of it.
    """
    ours, floor_seconds = timings.ratio("ours", floor), timings.seconds(floor)
    limit = "" if math.isnan(extra) else f"{1 + extra / floor_seconds:.3f}x {floor}"
    if not math.isnan(fused):
        limit += f" ({1 + fused / floor_seconds:.3f}x with fused additions)"
    value = "; ".join([described(timings, floor), *notes])
    goal, times = f"<= {most:.2f}x {floor}", timings.over(floor)
    return Result(row, workload, value, goal, ours <= most, times, limit=limit)
