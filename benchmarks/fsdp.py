"""``torchrun --nproc-per-node 2 -m benchmarks.fsdp``: MiniLM under FSDP2 and in one process.

The demo's model and data without dropout, whose random numbers would differ.
Every rank takes its rows of each batch; the first rank then trains the same model alone, on all of
them, and both losses of every step are compared.
"""

import argparse
import sys
from itertools import islice

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from lora_inject import inject, lora_parameters
from lora_inject.cli import demo

TOLERANCE = 1e-4  # float32 sums in another order


def adapted() -> tuple[nn.Module, demo.Words]:
    """The same model on every rank, and the words to train on."""
    torch.manual_seed(0)
    model, words, _ = demo.load()
    inject(model, demo.TARGETS, r=demo.RANK, train_also=["head"], seed=0)
    return model.eval(), words


def losses(model: nn.Module, words: demo.Words, steps: int, rank: int, ranks: int) -> list[float]:
    """The mean squared error of every step, over the whole batch."""
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=demo.LEARNING_RATE)
    batches = demo.batches(words, torch.Generator().manual_seed(0))
    found = []
    for batch in islice(batches, steps):
        own = batch[rank::ranks]
        loss = nn.functional.mse_loss(model(own), own.ratings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        if ranks > 1:
            distributed.all_reduce(mean)
        found.append(mean.item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()

    model, words = adapted()
    for layer in model.encoder.encoder.layer:
        fully_shard(layer)
    sharded = losses(fully_shard(model), words, steps, rank, ranks)
    distributed.destroy_process_group()
    if rank == 0:
        alone = losses(*adapted(), steps, 0, 1)
        apart = max(abs(one - other) for one, other in zip(sharded, alone, strict=True))
        print(f"{ranks} ranks with FSDP2: loss {sharded[0]:.6f} -> {sharded[-1]:.6f}")
        print(f"one process alone:   loss {alone[0]:.6f} -> {alone[-1]:.6f}")
        print(f"At most {apart:.1e} apart in {steps} steps.")
        sys.exit(apart > TOLERANCE)


if __name__ == "__main__":
    main()
