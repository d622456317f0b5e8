"""Which adapter of a model is meant where none is named."""

from lora_inject.core.look import Look
from lora_inject.errors import ArgumentError
from lora_inject.settings import check_adapter


def adapter_name(look: Look, adapter: str | None) -> str:
    """The adapter that is meant: that of the name, the only one, or the only one in use.

    Raises:
        ArgumentError: there is none of this name, or None could mean several.
    """
    if adapter is not None:
        look.require_known([check_adapter(adapter)], "adapter")
        return adapter
    known, used = sorted(look.known), sorted(look.used)
    for names in (known, used):
        if len(names) == 1:
            return names[0]
    raise ArgumentError(f"there are several adapters, {known}.", remedy="Name one by adapter=.")
