"""Inject and strip: a plan becomes adapted layers, all of them or none, and they come out again."""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from lora_inject.core.drift import warn_of_drift
from lora_inject.core.look import Look
from lora_inject.core.removal import remove_adapters
from lora_inject.errors import warn
from lora_inject.merging.folding import folded
from lora_inject.own import Model
from lora_inject.plan import Plan, plan
from lora_inject.report.report import Report

P = ParamSpec("P")
R = TypeVar("R")


def _with_arguments_of(plan: Callable[P, Plan]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function the signature of ``plan``, so that its arguments stand in one place."""

    def give(function: Callable[..., R]) -> Callable[P, R]:
        own = inspect.signature(function)
        signature = inspect.signature(plan).replace(return_annotation=own.return_annotation)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return give


@_with_arguments_of(plan)
def inject(*args: Any, **kwargs: Any) -> Report:  # noqa: D417 (those of plan)
    """Adapt layers of a model in place with LoRA (arXiv 2106.09685); nothing happens on an error.

    Each selected layer then computes ``f(x) + alpha / r * B A dropout(x)``, where f is what it
    computed before, A is (r, in) and B is (out, r). One of the two starts at zero, so that no
    output changes. All other parameters are frozen. ``strip`` undoes everything. Build the
    optimizer afterwards, of ``lora_parameters(model)``: one from before has none of A and B.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = inject(model, targets=["0"], r=2)
        >>> report.trainable, report.frozen
        (32, 90)

    Args:
        model: any ``nn.Module``, on any device, the meta device included.
        targets: which layers. ``"q_proj"`` and ``"self_attn.q_proj"`` match whole name components
            from the right; with ``*``, ``?`` or ``[`` a glob over the whole path; ``"re:..."``, or
            what ``re.compile`` returns, a regular expression that matches the whole path; a module
            class; a callable ``(path, module) -> bool``; ``"all-linear"``, every Linear-like layer
            but the output head; a list of these; or a mapping of these to settings,
            ``{"q_proj": {"r": 8, "alpha": 16, "fixed": "A"}}``. The first pattern that selects a
            layer decides. A string also selects a parameter that no layer calls, such as the
            fused ``"experts.gate_up_proj"``.
        r: rank, at least 1.
        alpha: the delta is scaled by alpha / r; None means alpha = r, a scaling of 1.
        dropout: probability of dropout on the input of the adapter, in [0, 1); or a mapping,
            ``{"input": 0.1, "rank": 0.1, "module": 0.05}``, where "rank" leaves ranks out, and
            "module" the adapter on a layer, for one call in training. Each is a child of the layer,
            ``layer.lora_dropout``, whose ``p`` may be set.
        scaling: "lora" scales by alpha / r, "rslora" by alpha / sqrt(r) (arXiv 2312.03732).
        variant: "lora", or "dora" (arXiv 2402.09353): the length of each row of the adapted weight
            is trained on its own, ``lora_magnitude``; "dora_columns": of each column. Or no
            ``B A``: "loha" multiplies two of them element by element, "lokr" is a Kronecker product
            (arXiv 2309.14859), "tucker" has a core between A and B that holds a convolution's
            kernel. All but "lora" and "dora" act in the weight, without dropout. Or an object of
            ``lora_inject.variants``, such as ``LoKr(factor=4)``.
        init: where A and B begin: "default", random A and zero B; "gaussian"; "pissa" (arXiv
            2404.02948), "milora" (2406.09044) and "olora" (2406.01775), directions of the weight
            itself; "mica" (2604.01694); an object of ``lora_inject.starts``, of which ``EVA``,
            ``CorDA`` and ``LoRAGA`` start from what ``calibrate`` has seen and ``LoftQ`` from the
            weights before quantizing; or a function of W, A and B that writes into A and B, which
            hold the usual start (``starts.Custom``). Those that do not begin at zero keep their
            start beside A and B and subtract it: the base is never moved. ``LoftQ`` alone moves
            outputs, towards those of the original.
        fixed: "A" or "B", a factor that stays as it starts and does not train; None trains both.
            With "A" (LoRA-FA, arXiv 2308.03303) less is kept for the backward pass.
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
            ``nn.MultiheadAttention``, recurrent layers and parameters are adapted so in any case,
            and so are layers on which another adapter acts so already.
        layout: for a fused weight of three dimensions that does not tell it itself: "out_in" for
            (E, out, in), "in_out" for (E, in, out). Per pattern, ``how`` and ``layout`` can be
            given in a mapping of targets too.
        parts: adapters for the parts of fused projections, ``{"c_attn": ("q", None, "v")}``: equal
            parts of the output, of which the named ones get an A and a B each (``q_lora_A``). Parts
            that are not equal have sizes: ``{"qkv_proj": (("q", 64), (None, 32), ("v", 32))}``.
        rows: rows of embeddings and output heads that train besides, by their ids, such as those
            of new tokens: ``{"embed_tokens": [32000, 32001]}``. What is added to each is a row of
            ``lora_rows`` (n, width), in ascending order of the ids, which starts at zero; rank,
            alpha, dropout, ``layers`` and the like do not concern it. A tied head has the same
            rows. With ``targets=()`` nothing else is adapted.

    Returns:
        The report of what trains now.

    Raises:
        ArgumentError: an argument cannot be used; the message starts with its name.
        NoMatchError: a pattern selects nothing, or nothing that can be adapted.
        UnsupportedLayerError: a selected layer cannot be adapted.
        AlreadyAdaptedError: a selected layer already carries an adapter of this name.
        LoRAInjectError: the model is merged or inside a block, or what is to train in place is tied
            to what trains already.
    """
    return plan(*args, **kwargs).apply()


def strip(model: Model, merge: bool = False) -> Model:
    """Undo every ``inject`` on the model: afterwards it is the model from before, bit for bit.

    Back come classes, the keys, order and bytes of ``state_dict``, every ``requires_grad`` and
    ``training`` flag, and the values of biases, ``train_also`` modules and their statistics that
    were trained. Modules, Parameters and hooks are the same objects as before. Gradients that
    frozen parameters had were dropped by ``inject`` and do not come back. After ``.to()`` or
    ``.half()`` the values are the cast ones.

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
            as it is; only classes, flags and statistics come back then, and no mode changes.

    Returns:
        The same object. On a model without adapters nothing is changed and a
        ``LoRAInjectWarning`` says so.

    Raises:
        LoRAInjectError: the model cannot be put back exactly; nothing is changed.
    """
    look = Look(model)
    if not look.states:
        warn("strip: the model has no adapters.")
        return model
    look.require_intact()
    look.require_no_block()
    if not merge:
        look.require_kept()
    warn_of_drift(look, "gone", "came", "thawed")
    if not look.adapted and not look.roots:
        warn(
            "strip: no adapter stands here; what is frozen was frozen by a call on a larger model."
        )
    if merge and any(state.running for state in look.adapted.values()):
        merged = folded(look, None, keep=False)
        remove_adapters(look, look.known, keep=True, values=merged.values)
    else:
        remove_adapters(look, look.known, keep=merge)
    return model
