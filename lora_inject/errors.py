"""What the library raises and warns with: one base class, each error with path and remedy."""

import sys
import warnings
from types import FrameType


class LoRAInjectError(ValueError):
    """Base of every error that lora_inject raises on purpose.

    Attributes:
        path: the module path the error is about, or ``None``.
        remedy: what to do about it, or ``""``. The message already ends with it.

    Example:
        >>> raise LoRAInjectError("it has no weight.", path="norm", remedy="Target a Linear.")
        Traceback (most recent call last):
        lora_inject.errors.LoRAInjectError: norm: it has no weight. Target a Linear.
    """

    def __init__(self, problem: str, *, path: str | None = None, remedy: str = "") -> None:
        where = "" if path is None else f"{path or '(the model itself)'}: "
        super().__init__(f"{where}{problem} {remedy}".rstrip())
        self.path = path
        self.remedy = remedy


class ArgumentError(LoRAInjectError):
    """An argument has a value that cannot be used; the message starts with its name."""


class NoMatchError(LoRAInjectError):
    """A pattern selects nothing, or nothing that can be adapted."""


class UnsupportedLayerError(LoRAInjectError):
    """A selected layer cannot be adapted, for the reason given."""


class AlreadyAdaptedError(LoRAInjectError):
    """A selected layer already carries an adapter."""


class FormatError(LoRAInjectError):
    """A file cannot be read or written, or does not fit the model; nothing has changed.

    What a file holds is not shown at any length, nor with what a terminal would obey.
    """

    def __init__(self, problem: str, *, path: str | None = None, remedy: str = "") -> None:
        super().__init__(
            shown(problem), path=None if path is None else shown(path), remedy=shown(remedy)
        )


def shown(text: str, most: int = 1000) -> str:
    """Text from elsewhere for people, without its middle where it is long, and printable.

    Args:
        text: the text.
        most: how many characters of it are shown.
    """
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class LoRAInjectWarning(UserWarning):
    """Something that is not an error but that the user should know."""


def warn(text: str) -> None:
    """Warn, at the line that called this library."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, LoRAInjectWarning, stacklevel=level)


def is_ours(frame: FrameType) -> bool:
    """Whether it is code of this library that runs there."""
    return str(frame.f_globals.get("__name__")).split(".")[0] == __package__
