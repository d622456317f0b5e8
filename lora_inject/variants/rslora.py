"""rsLoRA (arXiv 2312.03732): the factor is ``alpha / sqrt(r)``, so that high ranks learn too."""

import math
from dataclasses import dataclass

from lora_inject.variants.lora import Scaling


@dataclass(frozen=True)
class RankStabilized(Scaling):
    """``alpha / sqrt(r)``."""

    name = "rslora"
    peft = {"use_rslora": True}  # noqa: RUF012 (a constant of the class)

    def factor(self, alpha: float, r: int) -> float:
        """The factor, of alpha and r."""
        return alpha / math.sqrt(r)

    def alpha(self, factor: float, r: int) -> float:
        """The alpha, of a factor and r."""
        return factor * math.sqrt(r)
