"""Sites that are tied to one that was chosen: one adapter for all places of a weight."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lora_inject.core.resolving import Resolver
from lora_inject.core.site import Site
from lora_inject.errors import ArgumentError
from lora_inject.settings import Settings


def with_followers(resolver: Resolver, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites, with one adapter for each tied weight that every place of it shares.

    Raises:
        ArgumentError: targets choose several places of a tied weight with different settings.
        UnsupportedLayerError: one of the places could not see the adapter.
    """
    if not resolver.matcher.look.tied:
        return tuple(sites)
    chosen = {(site.module, spec.weight): site for site in sites for spec in site.specs}
    followers: dict[tuple[nn.Module, str], Site] = {}
    for site in sites:
        places = resolver.other_places(site)
        if (site.module, site.specs[0].weight) in followers:
            continue
        for follower in (resolver.follower(site, *place) for place in places):
            key = (follower.module, follower.specs[0].weight)
            if key in chosen and _at(site.path, chosen[key].settings) != site.settings:
                raise ArgumentError(
                    f"targets: {site.path} and {follower.path} are tied and share one adapter, but "
                    "are given different settings.",
                )
            followers[key] = follower
    leaders = [s for s in sites if (s.module, s.specs[0].weight) not in followers]
    return (*leaders, *followers.values())


def _at(path: str, settings: Settings) -> Settings:
    """The settings with the start of another path."""
    return replace(settings, start=settings.start.at(path))
