"""Tables of which some rows train, those of ``rows=``: chosen apart from the targets."""

from collections.abc import Sequence

from lora_inject.core.choosing import Skip, choose
from lora_inject.core.resolving import Resolver
from lora_inject.core.site import Site
from lora_inject.errors import ArgumentError


def choose_tables(resolver: Resolver, chosen: Sequence[Site]) -> tuple[list[Site], list[Skip]]:
    """The tables of which rows train, whatever ``layers`` says, and what is left alone.

    Raises:
        ArgumentError: one of them is among the layers that targets choose.
        LoRAInjectError: as ``choose``.
    """
    request = resolver.request._replace(settings=resolver.request.rows)
    exclusions = resolver.exclusions._replace(layers=None)
    tables, skips = choose(Resolver(resolver.matcher, request, exclusions), "rows")
    adapted = {site.module for site in chosen}
    for site in tables:
        if site.module in adapted:
            raise ArgumentError(
                "rows: targets choose it too, and an adapter has one or the other on a layer.",
                path=site.path,
                remedy="Exclude it from targets, or give its rows an adapter of their own: "
                'inject(model, (), rows=..., adapter="rows").',
            )
    return tables, skips
