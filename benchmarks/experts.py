"""What adapters on fused experts cost: time, what is kept for the backward pass, and the peak."""

import copy
import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.arithmetic import Step, layer_step
from benchmarks.harness import Result, compared, interleaved, row
from benchmarks.memory import bytes_kept
from benchmarks.peers import randomize, with_peft
from lora_inject import inject

NAMES = ["experts.gate_up_proj", "experts.down_proj"]
MIB = 2**20


class Sizes(NamedTuple):
    """Of a layer of fused experts: how many, their features, and how many see each token."""

    count: int
    hidden: int
    width: int
    top: int


class FusedExperts(nn.Module):
    """The fused experts of a Qwen3-MoE layer, with a fixed choice of experts for each token.

    Args:
        sizes: of the layer.
        tokens: how many there will be.
        dtype: of the weights.
        device: where they are.
    """

    def __init__(self, sizes: Sizes, tokens: int, dtype: torch.dtype, device: str = "cpu") -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            num_experts=sizes.count, hidden_size=sizes.hidden, moe_intermediate_size=sizes.width,
            num_experts_per_tok=sizes.top, experts_implementation="grouped_mm",
        )  # fmt: skip
        with torch.device(device):
            self.experts = Qwen3MoeExperts(config).to(dtype)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=0.02)
            weights, index = torch.rand(tokens, sizes.count).topk(sizes.top)
        self.register_buffer("index", index)
        self.register_buffer("weights", (weights / weights.sum(-1, keepdim=True)).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what each token's experts make of it."""
        return self.experts(x, self.index, self.weights)  # type: ignore[no-any-return]


def adapted(floor: nn.Module, r: int) -> nn.Module:
    """A copy with our adapters on both weights, in their dtype."""
    model = copy.deepcopy(floor)
    inject(model, NAMES, r=r, dtype="base")
    return randomize(model)


def adapted_by_peft(floor: nn.Module, r: int) -> Any:
    """The same with PEFT's."""
    options: Any = {"parameters": NAMES, "autocast_adapter_dtype": False}
    return randomize(with_peft(floor, [], r, **options))


@row("experts")
def experts(rounds: int) -> list[Result]:
    cases = ((torch.float32, 256), (torch.bfloat16, 64))
    # PEFT takes seconds.
    return [r for dtype, tokens in cases for r in _results(dtype, tokens, max(3, rounds // 5))]


def _results(dtype: torch.dtype, tokens: int, rounds: int) -> list[Result]:
    torch.manual_seed(0)
    sizes, r = Sizes(64, 512, 256, 8), 16
    floor = FusedExperts(sizes, tokens, dtype).requires_grad_(False)
    models = {"floor": floor, "ours": adapted(floor, r), "PEFT": adapted_by_peft(floor, r)}
    x = torch.randn(tokens, sizes.hidden, dtype=dtype, requires_grad=True)
    steps = {name: layer_step(model, [(x, torch.randn_like(x))]) for name, model in models.items()}
    workload = (
        f"{sizes.count} experts {sizes.hidden}x{sizes.width}, top {sizes.top}, {tokens} tokens, "
        f"r={r}, {str(dtype)[6:]}, grouped_mm"
    )
    # The inputs of both products and the two A x, and for the peak the gradients of A and B.
    inputs = tokens * sizes.top * (sizes.hidden + sizes.width + 2 * r) * dtype.itemsize
    gradients = sum(p.nbytes for p in models["ours"].parameters() if p.requires_grad)
    kept = {name: bytes_kept(partial(model, x)) for name, model in models.items()}
    peaks = {name: peak_of(models[name], step) for name, step in steps.items()}
    most_kept, most = kept["floor"] + inputs, peaks["floor"] + inputs + gradients
    timings = interleaved(steps, rounds)
    ours = timings.ratio("ours", "floor")
    return [
        Result("experts", f"{workload}: forward + backward", compared(timings),
               "<= 1.25x floor", ours <= 1.25, timings.over("floor"), _profile(dtype, tokens, r)),
        Result("experts", f"{workload}: kept for the backward pass", _bytes(kept),
               f"<= {most_kept / MIB:.1f} MiB (floor, inputs, A x)",
               kept["ours"] <= 1.01 * most_kept),
        Result("experts", f"{workload}: peak", _bytes(peaks),
               f"<= {most / MIB:.1f} MiB (floor, inputs, A x, gradients of A and B)",
               peaks["ours"] <= most),
    ]  # fmt: skip


def _profile(dtype: torch.dtype, tokens: int, r: int) -> str:
    """What one of the twelve products with A or B takes where it is made expert by expert."""
    rows = 8 * tokens
    ends = torch.arange(rows // 64, rows + 1, rows // 64, dtype=torch.int32)
    x, A = torch.randn(rows, 512, dtype=dtype), torch.randn(64, r, 512, dtype=dtype)
    alone = interleaved({"A x": lambda: F.grouped_mm(x, A.mT, offs=ends)}, 3, 5).seconds("A x")
    return (
        f"A x by F.grouped_mm takes {1e3 * alone:.2f} ms, in 64 products of {rows // 64} rows, and "
        "a step has twelve products of this size: on a CPU their calls cost more than their "
        "arithmetic. In 16 bits they are made of stacked rows instead, where that costs less."
    )


def _bytes(of: dict[str, int]) -> str:
    others = ", ".join(f"{name} {of[name] / MIB:.1f}" for name in of if name != "ours")
    return f"{of['ours'] / MIB:.1f} MiB ({others})"


def peak_of(model: nn.Module, step: Step) -> int:
    """The most bytes at one time that the operations of a step have made."""
    with _Living(model) as living:
        step()
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the storages that operations make inside, as long as they live."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self.known = {t.untyped_storage().data_ptr() for t in own}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage.nbytes() and storage.data_ptr() not in self.known:
                address, size = storage.data_ptr(), storage.nbytes()
                self.known.add(address)
                self.bytes += size
                weakref.finalize(storage, self._died, address, size)
        self.peak = max(self.peak, self.bytes)
        return result

    def _died(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.bytes -= size
