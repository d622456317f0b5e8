"""What an injection would do: targets and kinds put together and checked, nothing changed."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import nn

from lora_inject import settings as check
from lora_inject.core.adaptation import Content, adaptation
from lora_inject.core.checks import (
    require_alive,
    require_apart,
    require_exchangeable,
    require_extensible,
    require_free_places,
    require_injectable,
    require_one_owner,
    warn_of_adapters_of_peft,
)
from lora_inject.core.choosing import Skip, choose
from lora_inject.core.commit import commit
from lora_inject.core.followers import with_followers
from lora_inject.core.hints import require_arguments
from lora_inject.core.in_place import in_place
from lora_inject.core.look import Look
from lora_inject.core.matcher import Exclusions, Matcher
from lora_inject.core.parts import require_parts_used
from lora_inject.core.patterns import Patterns, Targets
from lora_inject.core.request import (
    ALL_LINEAR,
    Request,
    is_given,
    optional_patterns,
    parts_by_pattern,
    rows_by_pattern,
    settings_by_pattern,
)
from lora_inject.core.resolving import Resolver
from lora_inject.core.site import Site
from lora_inject.core.tables import choose_tables
from lora_inject.errors import warn
from lora_inject.printing import Shown, Tables, plural
from lora_inject.report import plan_tables
from lora_inject.report.new_parts import frozen_heads
from lora_inject.report.report import Report, report_of
from lora_inject.settings import BiasMode
from lora_inject.starts import Function, Start
from lora_inject.variants import Variant

P = ParamSpec("P")


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What ``inject`` would do to a model; ``print`` shows it as a table, ``apply`` does it.

    Attributes:
        look: the model it is for, as it was looked at.
        sites: the layers to adapt, in registration order; those that are tied to one come last.
        skipped: what was selected and is left alone, with reasons.
        adapter: the adapter's name.
        seed: the seed of the starting values; None draws one.
        content: what trains besides A and B, and the values where they are known already.
    """

    look: Look
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    adapter: str
    seed: int | None
    content: Content

    @property
    def model(self) -> nn.Module:
        """The model it is for."""
        return self.look.model

    @property
    def bias(self) -> BiasMode:
        """The bias mode."""
        return self.content.bias

    @property
    def train_also(self) -> Mapping[str, nn.Module]:
        """The modules that will train in full, by path."""
        return self.content.train_also

    @property
    def oversized(self) -> list[Site]:
        """Sites whose adapter has more parameters than what it adapts."""
        return [site for site in self.sites if site.parameters > site.base_elements]

    @property
    def parameters(self) -> int:
        """How many parameters the adapters will have."""
        return sum(site.parameters for site in self.sites)

    def apply(self) -> Report:
        """Carry the plan out, all of it or nothing.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 4))
            >>> plan(model, "0", r=2).apply().trainable
            16

        Returns:
            The report of what trains now.

        Raises:
            LoRAInjectError: the model has changed since the plan was made.
        """
        self.look.require_unchanged()
        look = self.look.again()  # its tensors may be others by now
        warn_of_adapters_of_peft(look)
        made = adaptation(look, self.sites, self.adapter, self.seed, self.content)
        # The report is made inside of it: what it raises, a warning say, undoes the injection.
        report: Report = commit(
            look, made.states, fresh=made.fresh, values=made.values,
            then=lambda: _reported(look.again(), self),
        )  # fmt: skip
        return report

    def _tables(self) -> Tables:
        sections = [plan_tables.sites_section(self)]
        if self.train_also:
            sections.append(plan_tables.train_also_section(self.train_also))
        if self.skipped:
            sections.append(plan_tables.skipped_section(self.skipped))
        return Tables(sections)


def _hinting(function: Callable[P, Plan]) -> Callable[P, Plan]:
    """Let an argument that there is not be an error that says what it is called here."""
    known = inspect.signature(function).parameters

    @wraps(function)
    def hinted(*args: P.args, **kwargs: P.kwargs) -> Plan:
        require_arguments(args, kwargs, known)
        return function(*args, **kwargs)

    return hinted


@_hinting
def plan(
    model: nn.Module,
    targets: Targets = ALL_LINEAR,
    *,
    r: int = 8,
    alpha: float | None = None,
    dropout: float | Mapping[str, float] = 0.0,
    scaling: str = "lora",
    variant: str | Variant = "lora",
    init: str | Start | Function = "default",
    fixed: str | None = None,
    bias: BiasMode = "none",
    exclude: Patterns = (),
    layers: int | Iterable[int] | None = None,
    train_also: Patterns = (),
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    adapter: str = "default",
    how: str = "auto",
    layout: str | None = None,
    parts: Mapping[Any, Any] | None = None,
    rows: Mapping[Any, Any] | None = None,
) -> Plan:
    """Work out what ``inject`` would do with the same arguments; the model is not changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> plan(model, nn.Linear, r=2).parameters
        16

    Args:
        model: any ``nn.Module``.
        targets: the layers to adapt; see ``inject`` for this and all that follow.
        r: rank.
        alpha: the delta is scaled by alpha / r.
        dropout: dropout on the adapter's input, of ranks, or of the adapter on a layer.
        scaling: "lora" or "rslora".
        variant: "lora", "dora", "dora_columns", "loha", "lokr", "tucker", or an object.
        init: where A and B begin.
        fixed: the factor that does not train, if any.
        bias: which biases train.
        exclude: what to leave alone.
        layers: block indices to keep.
        train_also: modules that train in full.
        dtype: dtype of A and B.
        seed: seed of the starting values.
        adapter: the adapter's name.
        how: "auto" or "weight".
        layout: order of the dimensions of fused weights.
        parts: named parts of fused projections.
        rows: ids of the rows of embeddings and output heads that train.

    Returns:
        The plan, which ``print`` shows as a table.

    Raises:
        ArgumentError: an argument cannot be used; the message starts with its name.
        NoMatchError: a pattern selects nothing, or nothing that can be adapted.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AlreadyAdaptedError: a selected layer already carries an adapter of this name.
        LoRAInjectError: the model is merged or inside a block, or what is to train in place is tied
            to what trains already.
    """
    look = Look(model)  # which refuses what is no model, before its arguments are read
    values = {
        "r": r, "alpha": alpha, "dropout": dropout, "scaling": scaling, "variant": variant,
        "init": init, "fixed": fixed, "how": how, "layout": layout,
    }  # fmt: skip
    of_rows = rows_by_pattern(rows)
    request = Request(
        settings=settings_by_pattern(targets, values) if is_given(targets) or not of_rows else {},
        rows=of_rows,
        excluded=optional_patterns(exclude, "exclude"),
        train_also=optional_patterns(train_also, "train_also"),
        parts=parts_by_pattern(parts),
        layers=check.check_layers(layers),
        dtype=check.check_dtype(dtype),
        seed=check.check_seed(seed),
        adapter=check.check_adapter(adapter),
        bias=check.check_bias(bias),
    )
    return plan_for(look, request)


def plan_for(
    look: Look, request: Request, content: Callable[[tuple[Site, ...]], Content] | None = None
) -> Plan:
    """The plan for a model that has been looked at.

    Args:
        look: the model.
        request: what is asked for.
        content: what an adapter that comes from elsewhere holds, once its layers are known; None
            for a new one.

    Returns:
        The plan.

    Raises:
        LoRAInjectError: as ``plan``.
    """
    require_injectable(look)
    look.require_awake()
    require_extensible(look, request.adapter, request.bias)
    matcher = Matcher(look)
    in_full = matcher.trainable_modules("train_also", request.train_also)
    resolver = Resolver(
        matcher,
        request,
        Exclusions(
            excluded=matcher.subtrees("exclude", request.excluded),
            in_full=frozenset(m for top in in_full.values() for m in look.index.below(top)),
            layers=request.layers,
        ),
    )
    chosen, skips = choose(resolver)
    tables, more = choose_tables(resolver, chosen)
    sites, skipped = with_followers(resolver, [*chosen, *tables]), (*skips, *more)
    require_apart(look, sites, in_full)
    require_parts_used(matcher, request.parts, sites)
    if content is not None:
        held = content(sites)
    else:
        require_alive(sites)
        trained = in_place(look, [s.module for s in sites], request.bias, [*in_full.values()])
        held = Content(request.bias, in_full, trained)
    require_exchangeable(look, held.in_place)
    require_one_owner(look, held.in_place)
    if held.joins:
        require_free_places(look, request.adapter, held.in_place)
    held = held._replace(left={skip.path: skip.reason for skip in skipped if skip.wanted})
    return Plan(look, sites, skipped, request.adapter, request.seed, held)


def _reported(now: Look, plan: Plan) -> Report:
    """The report with what the plan wanted and could not, and what it does that is no use."""
    shown = report_of(now)
    notes = plan_tables.not_adapted([skip for skip in plan.skipped if skip.wanted])
    notes += filter(None, dict.fromkeys(site.settings.start.note for site in plan.sites))
    if plan.oversized:
        site = plan.oversized[0]
        text = (
            f"{plural(len(plan.oversized), 'adapter')} with more parameters than what is adapted"
            f", such as {site.path or 'the model itself'}: {site.parameters:,} against "
            f"{site.base_elements:,}. Use a smaller r, or train it in full (train_also)."
        )
        warn(text)
        notes.append(text)
    alerts = (*shown.alerts, *frozen_heads(now, plan.skipped))
    return replace(shown, notes=(*shown.notes, *notes), alerts=alerts)
