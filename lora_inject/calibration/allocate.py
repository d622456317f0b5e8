"""``allocate``: ranks by what the inputs of layers vary in, within a budget (arXiv 2410.07170).

Every layer has one principal direction of its inputs after the other, each with its share of their
variance. The directions with the largest shares of all layers get a unit of rank, as many as the
budget allows. Layers that read the same get the same.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from lora_inject.calibration.statistics import Paths, Statistics
from lora_inject.capacity.capacity import capacity
from lora_inject.capacity.without_values import on_meta
from lora_inject.errors import ArgumentError
from lora_inject.inject import inject
from lora_inject.printing import size
from lora_inject.settings import check_alpha, check_count, check_word
from lora_inject.variants import SCALINGS, Scaling

Targets = dict[str, dict[str, Any]]
_R = 8  # as inject has it
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def allocate(
    stats: Statistics,
    r: int | None = None,
    *,
    alpha: float | None = None,
    rho: float = 2.0,
    scaling: str = "lora",
    parameters: int | None = None,
    budget: str | int | None = None,
    model: nn.Module | None = None,
    adaptation: Mapping[str, Any] | None = None,
    **planner: Any,
) -> Targets:
    """Give each layer a rank by how much of its inputs' variance so many directions explain.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> stats = calibrate(model, "all-linear", [torch.randn(8, 4)])
        >>> targets = allocate(stats, r=1)
        >>> sum(values["r"] for values in targets.values())
        2

    Args:
        stats: what ``calibrate`` returned.
        r: the mean rank; None for 8, or for what the budget allows.
        alpha: for that rank; every layer gets the alpha of the same scaling. None for alpha = r.
        rho: no layer gets more than rho times the mean rank; 1 gives all the same.
        scaling: the rule of ``inject(scaling=)`` that the layers are adapted with.
        parameters: how many parameters A and B may have, all together and without ``parts``, in
            place of r.
        budget: how many bytes training may take on each device, such as ``"24GB"`` or ``"24GiB"``,
            in place of r. The largest mean rank is taken that fits, by ``capacity``.
        model: with budget: the model, without the adapter.
        adaptation: with budget: further arguments of ``inject``, such as ``{"variant": "dora"}``.
        planner: with budget: arguments of ``capacity``, such as ``batch=``, ``seq=``,
            ``optimizer=``, ``checkpointing=``.

    Returns:
        Targets for ``inject``: by path ``{"r": ..., "alpha": ...}``, and the scaling unless it is
        the usual one. A layer that gets no rank is not among them.

    Raises:
        ArgumentError: an argument cannot be used, or the budget is not enough for a rank of 1.
        LoRAInjectError: as ``capacity``.
    """
    if sum(given is not None for given in (r, parameters, budget)) > 1:
        raise ArgumentError("r, parameters and budget: give one of them.")
    if budget is None and (model is not None or adaptation or planner):
        raise ArgumentError("model, adaptation and what capacity reads are for budget= alone.")
    if not isinstance(rho, int | float) or not 1 <= rho < float("inf"):
        raise ArgumentError(f"rho must be a finite number of at least 1, not {rho!r}.")
    if not isinstance(stats, Statistics):
        raise ArgumentError(f"stats must be what calibrate returns, not a {type(stats).__name__}.")
    rule = SCALINGS[check_word(scaling, "scaling", SCALINGS)]
    alpha = None if alpha is None else check_alpha(alpha, "alpha")
    shared = _Shared(stats, rho)
    if budget is not None:
        fits = _Fits(shared, alpha, rule, model, {**(adaptation or {})}, planner)
        return fits.largest(_bytes(budget))
    if parameters is not None:
        most = check_count(parameters, "parameters")
        return _targets(stats, shared.by_parameters(most), shared.mean_rank(most), alpha, rule)
    r = _R if r is None else check_count(r, "r")
    return _targets(stats, shared.by_rank(r), r, alpha, rule)


class _Direction(NamedTuple):
    """A direction of an input, in the order in which they get a unit of rank."""

    share: float
    group: int
    place: int


class _Shared:
    """A budget of ranks among the layers, those that read the same together.

    Args:
        stats: the statistics.
        rho: no layer gets more than this times the mean rank.
    """

    def __init__(self, stats: Statistics, rho: float) -> None:
        self.stats, self.rho, self.groups = stats, rho, stats.groups
        layers = stats.layers
        self.costs = [sum(layers[path].elements for path in group) for group in self.groups]
        self.limits = [self._limit(group) for group in self.groups]

    def by_rank(self, r: int) -> dict[str, int]:
        """Ranks that are r on average, where all layers can have so many."""
        sizes = [len(group) for group in self.groups]
        ranks = self._shared(r * len(self.stats.layers), sizes, r)
        if not ranks:
            raise ArgumentError(
                "stats: they are of one vector for each layer, which tells nothing."
            )
        return ranks

    def by_parameters(self, parameters: int) -> dict[str, int]:
        """Ranks with which A and B have no more parameters than these."""
        ranks = self._shared(parameters, self.costs, self.mean_rank(parameters))
        if not ranks:
            raise ArgumentError(
                f"parameters={parameters:,} is not enough for a rank of 1.",
                remedy=f"Give {min(self.costs):,} or more.",
            )
        return ranks

    def mean_rank(self, parameters: int) -> int:
        """The rank that all layers could have, at least 1."""
        return max(1, parameters // sum(self.costs))

    def _limit(self, group: Paths) -> int:
        """The largest rank that the matrices and the inputs of a group allow."""
        moments = self.stats.inputs_of(group[0])
        assert moments is not None
        return min(moments.count - 1, *(self.stats.layers[path].most for path in group))

    def _shared(self, budget: int, costs: list[int], r: int) -> dict[str, int]:
        ranks = [0] * len(self.groups)
        full = [False] * len(self.groups)
        for direction in self._directions(int(self.rho * r)):
            group = direction.group
            full[group] |= costs[group] > budget  # smaller ones may still find room
            if not full[group]:
                ranks[group] += 1
                budget -= costs[group]
        return {path: ranks[i] for i, group in enumerate(self.groups) for path in group if ranks[i]}

    def _directions(self, most: int) -> list[_Direction]:
        """The first directions of every input, those that explain most first."""
        found = []
        for i, (group, limit) in enumerate(zip(self.groups, self.limits, strict=True)):
            moments = self.stats.inputs_of(group[0])
            assert moments is not None
            shares = moments.shares(max(1, min(most, limit)))
            if shares.dim() > 1:  # the groups of a convolution have one rank
                shares = shares.mean(tuple(range(shares.dim() - 1)))
            kept = shares.tolist()[: min(most, limit)]
            found += [_Direction(share, i, j) for j, share in enumerate(kept)]
        return sorted(found, key=lambda d: (-d.share, d.place, d.group))


class _Fits:
    """The largest mean rank with which training fits into a memory."""

    def __init__(
        self, shared: _Shared, alpha: float | None, rule: Scaling, model: nn.Module | None,
        adaptation: dict[str, Any], planner: dict[str, Any],
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise ArgumentError("model: a budget in bytes is of a model: give model=.")
        self.shared, self.alpha, self.rule = shared, alpha, rule
        self.model, self.adaptation, self.planner = model, adaptation, planner

    def targets(self, r: int) -> Targets:
        """The targets of a mean rank."""
        stats = self.shared.stats
        return _targets(stats, self.shared.by_rank(r), r, self.alpha, self.rule)

    def total(self, r: int) -> int:
        """The bytes that training takes with it."""
        twin = on_meta(self.model)
        inject(twin, self.targets(r), **self.adaptation)
        return capacity(twin, **self.planner).total

    def largest(self, budget: int) -> Targets:
        """The targets of the largest mean rank that fits."""
        least = self.total(1)
        if least > budget:
            raise ArgumentError(
                f"budget: training takes {size(least)} with a mean rank of 1, more than "
                f"{size(budget)}."
            )
        low, high = 1, max(self.shared.limits) + 1  # low fits, high does not or is of no use
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total(middle) <= budget else (low, middle)
        return self.targets(low)


def _targets(
    stats: Statistics, ranks: Mapping[str, int], r: int, alpha: float | None, rule: Scaling
) -> Targets:
    """Targets in which every layer has the scaling of rank r."""
    factor = rule.factor(float(r) if alpha is None else alpha, r)
    more = {} if rule.name == Scaling.name else {"scaling": rule.name}
    return {
        stats.layers[path].pattern: {"r": rank, "alpha": rule.alpha(factor, rank), **more}
        for path, rank in ranks.items()
    }


def _bytes(budget: Any) -> int:
    """``"24GB"`` as a number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", str(budget))
    if isinstance(budget, str) and found and found[2].upper() in _UNITS:
        return int(float(found[1]) * _UNITS[found[2].upper()])
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    raise ArgumentError(f'budget must be bytes, such as "24GB", "24GiB" or 2**34, not {budget!r}.')
