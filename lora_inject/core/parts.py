"""The parts of fused projections: which layers they are for."""

from collections.abc import Mapping, Sequence

from torch import nn

from lora_inject.core.matcher import Matcher
from lora_inject.core.patterns import Pattern
from lora_inject.core.site import Site
from lora_inject.errors import NoMatchError
from lora_inject.settings import Parts


def parts_by_module(matcher: Matcher, to_part: Mapping[Pattern, Parts]) -> dict[nn.Module, Parts]:
    """The parts of each layer that a pattern selects."""
    return {
        named.module: parts
        for pattern, parts in to_part.items()
        for named in matcher.modules_of("parts", pattern)
    }


def require_parts_used(
    matcher: Matcher, to_part: Mapping[Pattern, Parts], sites: Sequence[Site]
) -> None:
    """Refuse parts of layers that nothing adapts."""
    chosen = {site.module for site in sites}
    for pattern in to_part:
        if not any(named.module in chosen for named in matcher.modules_of("parts", pattern)):
            raise NoMatchError(f"parts: {pattern.label!r} selects no layer that targets choose.")
