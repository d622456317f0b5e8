"""Inject and strip: a plan becomes adapted layers, all of them or none, and they come out again."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject import initial
from lora_inject.errors import ArgumentError, LoRAInjectWarning
from lora_inject.freeze import mark
from lora_inject.kinds import Kind
from lora_inject.layer import Adapter, LoRALayer, attach, detach, parameter_names
from lora_inject.plan import Plan, Site, plan
from lora_inject.record import (
    Before,
    adapted_layers,
    gather,
    install,
    records_in,
    require_own_record,
    uninstall,
)
from lora_inject.report import Report, report
from lora_inject.selection import ALL_LINEAR
from lora_inject.settings import BiasMode


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
            layer decides.
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

    Returns:
        The report of what trains now.

    Raises:
        ArgumentError: an argument cannot be used; the message starts with its name.
        NoMatchError: a pattern selects nothing, or nothing that can be adapted.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AlreadyAdaptedError: a selected layer already carries an adapter.
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
    )
    return _apply(wanted)


def _apply(wanted: Plan) -> Report:
    model = wanted.model
    earlier = records_in(model)
    if earlier and earlier[0][2].bias != wanted.bias:
        raise ArgumentError(
            f"bias={wanted.bias!r}, but the model was injected with bias={earlier[0][2].bias!r}.",
            remedy="Use the same mode, and freeze(model, bias=...) to change it.",
        )
    decided = {module for _, _, record in earlier for module in record.before.training}
    undecided = [module for module in model.modules() if module not in decided]
    seed = initial.draw_seed() if wanted.seed is None else wanted.seed

    undo, changes = Before(), Before()
    for before in (undo, changes):
        before.keep_flags(model.modules())
    attached: list[LoRALayer] = []
    try:
        for site in wanted.sites:
            attached.append(_adapt(site, wanted.adapter, seed))
        record = gather(model, changes)
        new_modules = list(wanted.train_also.values())
        mark(model, attached, wanted.bias, new_modules, record.before, undecided)
    except BaseException:
        for layer in attached:
            detach(layer)
        undo.restore()
        raise
    record.layers |= {site.path: layer for site, layer in zip(wanted.sites, attached, strict=True)}
    record.train_also += new_modules
    record.bias = wanted.bias
    install(model, record)
    return report(model)


def _adapt(site: Site, name: str, seed: int) -> LoRALayer:
    A_name, B_name = parameter_names(name)
    adapter = Adapter(name, site.settings, A_name, B_name, site.pattern, site.path, seed)
    device = site.kind.weight(site.module).device
    # Tensors made in inference mode could never be trained.
    with torch.inference_mode(False):
        if device.type == "meta":
            shapes = site.kind.shapes((site.n_in, site.n_out), site.settings.r)
            A, B = (torch.empty(shape, device=device, dtype=site.dtype) for shape in shapes)
        else:
            values = _starting_values(site.kind, (site.n_in, site.n_out), adapter)
            A, B = (value.to(device, site.dtype) for value in values)
        return attach(site.module, site.kind, adapter, A, B)


def _starting_values(
    kind: Kind, features: tuple[int, int], adapter: Adapter
) -> tuple[Tensor, Tensor]:
    generator = initial.site_generator(adapter.seed, adapter.name, adapter.path)
    return kind.initial(features, adapter.settings.r, generator)


def reset_lora_parameters(model: nn.Module) -> None:
    """Give every A and B the starting values again that ``inject`` gave or would have given.

    After ``inject`` on the meta device this makes the adapters real. The order is then: build on
    meta, inject, ``to_empty``, load the base weights, ``reset_lora_parameters``, train.

    Example:
        >>> reset_lora_parameters(model)  # doctest: +SKIP
    """
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            features = layer.kind.features(layer)
            for adapter in layer.adapters.values():
                A, B = layer.get_parameter(adapter.A_name), layer.get_parameter(adapter.B_name)
                values = _starting_values(layer.kind, features, adapter)
                for parameter, value in zip((A, B), values, strict=True):
                    parameter.copy_(value)
    for _, _, record in records_in(model):
        for module, name in list(record.before.unknown_values()):
            record.before.keep_value(module, name)


def strip(model: nn.Module) -> nn.Module:
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

    Returns:
        The same object. On a model without adapters nothing is changed and a
        ``LoRAInjectWarning`` says so.

    Raises:
        LoRAInjectError: the model cannot be put back exactly; nothing is changed.
    """
    require_own_record(model)
    records = records_in(model)
    if not records:
        warnings.warn("strip: the model has no adapters.", LoRAInjectWarning, stacklevel=2)
    for _, _, record in records:
        record.check_restorable()
    for _, holder, record in records:
        record.restore()
        uninstall(holder)
    return model
