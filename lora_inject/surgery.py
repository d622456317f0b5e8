"""Inject and strip: a plan becomes adapted layers, all of them or none, and they come out again."""

import warnings
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject import initial
from lora_inject.adapter import Adapter
from lora_inject.core.look import Look
from lora_inject.errors import LoRAInjectError, LoRAInjectWarning
from lora_inject.freeze import mark, take
from lora_inject.in_place import Place
from lora_inject.kinds import Spec
from lora_inject.layer import attach, detach
from lora_inject.merge import fold
from lora_inject.placements import fill, require_whole, reshard
from lora_inject.plan import Plan, plan
from lora_inject.record import (
    Before,
    Mode,
    Record,
    install,
    reinstall,
    set_in_use,
    set_trainable,
    uninstall,
)
from lora_inject.report import Report, report_of
from lora_inject.selection import ALL_LINEAR
from lora_inject.settings import BiasMode
from lora_inject.sites import Site
from lora_inject.tables import plural


def inject(
    model: nn.Module,
    targets: Any = ALL_LINEAR,
    *,
    r: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    bias: BiasMode = "none",
    exclude: Any = (),
    layers: Any = None,
    train_also: Any = (),
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    adapter: str = "default",
    how: str = "auto",
    layout: str | None = None,
    parts: Mapping[Any, Any] | None = None,
) -> Report:
    """Adapt layers of a model in place with LoRA (arXiv 2106.09685); nothing happens on an error.

    Each selected layer then computes ``f(x) + alpha / r * B A dropout(x)``, where f is what it
    computed before, A is (r, in) and B is (out, r). One of the two starts at zero, so that no
    output changes. All other parameters are frozen. ``strip`` undoes everything.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = inject(model, targets=["0"], r=2)
        >>> report.trainable, report.frozen
        (32, 90)

    Args:
        model: any ``nn.Module``, on any device, the meta device included.
        targets: which layers. ``"q_proj"`` and ``"self_attn.q_proj"`` match whole name components
            from the right; with ``*``, ``?`` or ``[`` a glob over the whole path; ``"re:..."`` a
            regular expression that matches the whole path; a module class; a callable
            ``(path, module) -> bool``; ``"all-linear"``, every Linear-like layer but the output
            head; a list of these; or a mapping of these to settings,
            ``{"q_proj": {"r": 8, "alpha": 16, "dropout": 0.1}}``. The first pattern that selects a
            layer decides. A string also selects a parameter that no layer calls, such as the
            fused ``"experts.gate_up_proj"``.
        r: rank, at least 1.
        alpha: the delta is scaled by alpha / r; None means alpha = r, a scaling of 1.
        dropout: probability of dropout on the input of the adapter, in [0, 1).
        bias: the biases that train: "none", "all" in the model, or "lora_only", those of adapted
            layers. Biases that were frozen before stay frozen.
        exclude: layers to leave alone, in the same grammar; excluding a module excludes what is
            inside it.
        layers: block indices to keep: an integer or several; negative ones count from the end. A
            layer's block index is the first number in its path.
        train_also: modules that train in full, such as a new head, in the same grammar.
        dtype: of A and B: None for float32 over a 16-bit or quantized base and the base's own
            otherwise, "base" for the base's own, or a dtype.
        seed: decides the starting values; None takes one draw from torch's global generator.
        adapter: the adapter's name; "default" has parameters ``lora_A`` and ``lora_B``.
        how: "auto", or "weight" for layers whose weight is read and not called: where the weight is
            read there is then ``W + alpha / r * B A``, computed at each reading. The layers of
            ``nn.MultiheadAttention``, recurrent layers and parameters are adapted so in any case.
        layout: for a fused weight of three dimensions that does not tell it itself: "out_in" for
            (E, out, in), "in_out" for (E, in, out). Per pattern, ``how`` and ``layout`` can be
            given in a mapping of targets too.
        parts: adapters for the parts of fused projections, ``{"c_attn": ("q", None, "v")}``: equal
            parts of the output, of which the named ones get an A and a B each (``q_lora_A``). Parts
            that are not equal have sizes: ``{"qkv_proj": (("q", 64), (None, 32), ("v", 32))}``.

    Returns:
        The report of what trains now.

    Raises:
        ArgumentError: an argument cannot be used; the message starts with its name.
        NoMatchError: a pattern selects nothing, or nothing that can be adapted.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AlreadyAdaptedError: a selected layer already carries an adapter of this name.
    """
    wanted = plan(
        model,
        targets,
        r=r,
        alpha=alpha,
        dropout=dropout,
        bias=bias,
        exclude=exclude,
        layers=layers,
        train_also=train_also,
        dtype=dtype,
        seed=seed,
        adapter=adapter,
        how=how,
        layout=layout,
        parts=parts,
    )
    undo = apply(wanted)
    try:
        return _with_notes(report_of(wanted.look.again()), wanted)
    except BaseException:
        undo()
        raise


Values = Mapping[tuple[str, str], tuple[Tensor, Tensor]]


def apply(
    wanted: Plan,
    values: Values | None = None,
    tensors: Mapping[Place, Tensor] | None = None,
    use: bool = True,
) -> Callable[[], None]:
    """Carry out a plan, all of it or nothing.

    Args:
        wanted: the plan.
        values: A and B by path and prefix of each pair; None for starting values.
        tensors: values of what trains in place.
        use: whether the adapter joins those in use and trains; else it waits for ``use``.

    Returns:
        What makes the model what it was before this call, until something else changes it.
    """
    look, modules = wanted.look, wanted.look.index.modules
    decided = {module for record in look.records for module in record.before.training}
    undecided = [module for module in modules if module not in decided]
    gradients = [(parameter, parameter.grad) for parameter in look.parameters]
    seed = initial.draw_seed() if wanted.seed is None else wanted.seed

    changes, attached = Before(), dict[str, tuple[nn.Module, Adapter]]()
    changes.keep(modules)
    record = look.gathered(copy(changes))
    owned = {slot: set(slot.trains) for slot in record.all_slots()}

    def undo() -> None:
        for layer, adapter in reversed(attached.values()):
            detach(layer, adapter)
        for slot in record.all_slots():
            if wanted.adapter not in owned.get(slot, ()):
                slot.disown(wanted.adapter)
        record.forget_unowned_slots()
        changes.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for former in look.records:
            set_in_use(former, former.in_use)
        reinstall(look.again().holders, look.holders)

    try:
        for site in wanted.sites:
            shared = attached[site.follows] if site.follows else None
            attached[site.path] = _adapt(site, wanted.adapter, seed, shared, values)
        _enter(record, wanted, attached, undecided, use)
        _fill_slots(record, wanted.adapter, tensors or {})
        install(look, record)
    except BaseException:
        undo()
        raise
    return undo


def _enter(
    record: Record,
    wanted: Plan,
    attached: dict[str, tuple[nn.Module, Adapter]],
    undecided: list[nn.Module],
    use: bool,
) -> None:
    """Write a new adapter into the record; put it in use beside the others, and let it train."""
    name, in_full = wanted.adapter, list(wanted.train_also.values())
    take(wanted.look, record, name, wanted.in_place, inside=use)
    parameters = {m.get_parameter(n) for m, a in attached.values() for n in a.parameters}
    record.adapters += [(path, *pair) for path, pair in attached.items()]
    record.modes.setdefault(name, Mode(wanted.bias)).train_also += in_full
    if use:
        mark(wanted.look, undecided, parameters, wanted.in_place, in_full)
        record.training = record.training | {name}
        set_in_use(record, {name: 1.0, **record.in_use})
    else:
        set_trainable(parameters, False)
        set_in_use(record, record.in_use)


@torch.no_grad()
def _fill_slots(record: Record, adapter: str, tensors: Mapping[Place, Tensor]) -> None:
    for (module, name), value in tensors.items():
        tensor = record.slots[module][name].tensor(adapter)
        assert tensor is not None
        fill(tensor, value)


def _with_notes(shown: Report, wanted: Plan) -> Report:
    """The report with what the plan wanted and could not, and what it does that is no use."""
    missed = [skip for skip in wanted.skipped if skip.wanted]
    notes = [
        f"Not adapted: {paths[0]}"
        + (f" and {len(paths) - 1} more" if paths[1:] else "")
        + f": {why}"
        for why in dict.fromkeys(skip.reason for skip in missed)
        for paths in [[skip.path for skip in missed if skip.reason == why]]
    ]
    if wanted.oversized:
        site = wanted.oversized[0]
        text = (
            f"{plural(len(wanted.oversized), 'adapter')} with more parameters than what is adapted"
            f", such as {site.path or 'the model itself'}: {site.parameters:,} against "
            f"{site.base_elements:,}. Use a smaller r, or train it in full (train_also)."
        )
        warnings.warn(text, LoRAInjectWarning, stacklevel=3)
        notes.append(text)
    return replace(shown, notes=(*shown.notes, *notes))


def _adapt(
    site: Site,
    name: str,
    seed: int,
    shared: tuple[nn.Module, Adapter] | None,
    given: Values | None,
) -> tuple[nn.Module, Adapter]:
    adapter = Adapter(
        name, site.settings, site.kind, site.way, site.specs, site.pattern, site.path, seed,
        site.follows,
    )  # fmt: skip
    if shared is not None:
        leader, ((_, A_name, B_name),) = shared[0], shared[1].pairs
        pair = leader.get_parameter(A_name), leader.get_parameter(B_name)
        attach(site.module, adapter, [pair])
        return site.module, adapter
    device = site.kind.weight(site.module, site.specs[0].weight).device
    # Tensors made in inference mode could never be trained.
    with torch.inference_mode(False):
        values = []
        for spec in site.specs:
            if given is not None:
                A, B = given[site.path, spec.prefix]
            elif device.type == "meta":
                A, B = (torch.empty(s, device=device) for s in (spec.A_shape, spec.B_shape))
            else:
                A, B = _starting_values(adapter, spec)
            values.append((A.to(device, site.dtype), B.to(device, site.dtype)))
        attach(site.module, adapter, values)
    return site.module, adapter


def _starting_values(adapter: Adapter, spec: Spec) -> tuple[Tensor, Tensor]:
    path = f"{adapter.path}/{spec.prefix}" if spec.prefix else adapter.path
    generator = initial.site_generator(adapter.seed, adapter.name, path)
    return adapter.kind.initial(spec, generator)


def reset_lora_parameters(model: nn.Module) -> None:
    """Give every A and B the starting values again that ``inject`` gave or would have given.

    After ``inject`` on the meta device this makes the adapters real. The order is then: build on
    meta, inject, ``to_empty``, load the base weights, ``reset_lora_parameters``, train.

    Example:
        >>> reset_lora_parameters(model)  # doctest: +SKIP

    Raises:
        LoRAInjectError: an adapter is still on the meta device; nothing is changed.
    """
    look = Look(model)
    reshard(look.index.modules)
    pairs = [
        (path, adapter, spec, layer.get_parameter(A_name), layer.get_parameter(B_name))
        for path, layer in look.layers.items()
        for adapter in look.states[layer].adapters
        if not adapter.follows
        for spec, A_name, B_name in adapter.pairs
    ]
    for path, _, spec, A, B in pairs:
        require_whole(f"lora_A of {path}", A, spec.A_shape)
        require_whole(f"lora_B of {path}", B, spec.B_shape)
        if A.is_meta or B.is_meta:
            raise LoRAInjectError(
                "its adapter is on the meta device and has no values to set.",
                path=path,
                remedy='Call model.to_empty(device="cpu") first, then load the base weights.',
            )
    for record in look.records:
        record.tie()
    with torch.no_grad():
        for _, adapter, spec, A, B in pairs:
            for parameter, value in zip((A, B), _starting_values(adapter, spec), strict=True):
                fill(parameter, value, source=0)  # whatever seed the other ranks drew
    for slot in look.slots:
        slot.keep_unknown()


def strip(model: nn.Module, merge: bool = False) -> nn.Module:
    """Undo every ``inject`` on the model: afterwards it is the model from before, bit for bit.

    Back come classes, the keys, order and bytes of ``state_dict``, every ``requires_grad`` and
    ``training`` flag, and the values of biases, ``train_also`` modules and their statistics that
    were trained. Modules, Parameters and hooks have been the same objects all along. After
    ``.to()`` or ``.half()`` the values are the cast ones.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = inject(model, nn.Linear, r=2)
        >>> strip(model)
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )

    Args:
        model: the model that ``inject`` was called on, a copy of it, or a wrapper that holds it.
        merge: leave plain layers with the adapters in use folded in, and what they trained in place
            as it is; only classes, flags and statistics come back then.

    Returns:
        The same object. On a model without adapters nothing is changed and a
        ``LoRAInjectWarning`` says so.

    Raises:
        LoRAInjectError: the model cannot be put back exactly; nothing is changed.
    """
    look = Look(model)
    look.require_own_record()
    if not look.records:
        warnings.warn("strip: the model has no adapters.", LoRAInjectWarning, stacklevel=2)
    for record in look.records:
        record.check_restorable(values=not merge)
    if merge and any(state.running for state in look.states.values()):
        fold(look, keep=False)
    for _, holder, record in look.holders:
        if merge:
            record.forget_values()
        record.restore()
        uninstall(holder)
    return model
