"""A start that came with a file: what it was made of is not there, and is not needed any more."""

from dataclasses import dataclass

from lora_inject.starts.default import Start


@dataclass(frozen=True)
class Saved(Start):
    """The start of an adapter that was loaded; anew, it begins as the usual one does.

    Attributes:
        made_by: the name of the start that made it, or "".
    """

    made_by: str = ""
    name = "saved"
    offset = True

    @property
    def word(self) -> str:
        """The start that made it."""
        return self.made_by
