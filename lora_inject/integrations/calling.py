"""The trainer of transformers that is calling: what it hands to callbacks and models lacks it."""

import sys
from types import FrameType

from transformers import Trainer


def trainer_above() -> Trainer | None:
    """The innermost trainer on the stack; None where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self")
        if isinstance(own, Trainer):
            return own
        frame = frame.f_back
    return None
