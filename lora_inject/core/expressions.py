"""Regular expressions from anywhere, downloaded files too: bounded in length, time and memory.

They are those of the package ``regex``, which can be stopped, as the standard library's ``re``
cannot. Its time limit is for matching alone; what would fill the memory is told from the text.
"""

import math
import re
import time

from lora_inject.errors import LoRAInjectError

REPEATS = 1000  # the engine writes out what is to be there so often: counts in counts multiply
_COUNT = re.compile(r"\{(\d+)")
_CALL = re.compile(r"\(\?(?:R|[+-]?\d|&|P>)")  # (?R), (?1), (?&name): of a group, by itself too


class Limits:
    """How long expressions may be and take: one and a whole model, or all of a file together.

    Args:
        seconds: for all of their matches.
        characters: for each.
    """

    def __init__(self, seconds: float = 2.0, characters: int = 2000) -> None:
        self.seconds, self.characters, self.left = seconds, characters, seconds


class Expression:
    """A regular expression that is asked whether it matches the whole of a path.

    Args:
        text: the expression.
        what: what it is, in front of messages.
        error: the class of what is raised.
        limits: how long it may be and take.

    Raises:
        LoRAInjectError: it cannot be used.
    """

    def __init__(self, text: str, what: str, error: type[LoRAInjectError], limits: Limits) -> None:
        import regex  # which takes long to import, and few calls need it

        self.text, self.what, self.error, self.limits = text, what, error, limits
        if not 0 < len(text) <= limits.characters:
            raise error(
                f"{what}: a regular expression has 1 to {limits.characters} characters, "
                f"{text[:40]!r} has {len(text)}."
            )
        if why := _unbounded(text):
            raise error(f"{what}: {text!r} {why}.", remedy="Use a simpler expression.")
        try:
            self.compiled = regex.compile(text)
        except Exception as problem:  # what it raises differs from version to version
            why = f"cannot be used, as it is not a regular expression: {problem}"
            raise error(f"{what}: {text!r} {why}.") from problem

    def matches(self, path: str) -> bool:
        """Whether it matches the whole path.

        Raises:
            LoRAInjectError: that takes too long.
        """
        started = time.perf_counter()
        try:
            return self.compiled.fullmatch(path, timeout=max(self.limits.left, 1e-3)) is not None
        except (TimeoutError, MemoryError) as problem:
            raise self.error(
                f"{self.what}: {self.text!r} takes longer than {self.limits.seconds:g} s on "
                f"{path!r}.",
                remedy="Nested repetitions cause this; use a glob or a simpler expression.",
            ) from problem
        finally:
            self.limits.left -= time.perf_counter() - started


def _unbounded(text: str) -> str:
    """What in an expression would fill the memory; "" where nothing does."""
    # With the flag x, blanks and comments may stand anywhere.
    for form in ("".join(text.split()), "".join(re.sub("#.*", "", text).split())):
        if _CALL.search(form):
            return "calls a group, which may call itself"
        if math.prod(max(1.0, float(count)) for count in _COUNT.findall(form)) > REPEATS:
            return f"has counts that multiply to more than {REPEATS}"
    return ""
