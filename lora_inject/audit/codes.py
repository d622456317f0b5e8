"""Everything that an audit can find: stable codes, each with its meaning and the remedy.

``page`` makes the page ``audit_codes`` of it, in the guide. No code is renamed or given another
meaning.
"""

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")  # the worst first


class Code(NamedTuple):
    """Something that can be found.

    Attributes:
        severity: "error": something does not train, or not what was meant; "warning": it may be
            meant, and mostly is not; "note": it costs something or is to be known.
        meaning: what it means.
        remedy: what to do about it.
    """

    severity: Severity
    meaning: str
    remedy: str


CODES: dict[str, Code] = {
    # --- what adapters there are ---------------------------------------------------------------
    "no-adapter": Code(
        "error",
        "The model has no adapter: a copy, an average or a compiled form from before inject has "
        "none, and neither has a model after strip.",
        "Call inject, or audit the model that it was called on.",
    ),
    "asleep": Code(
        "note",
        "An adapter trains and does not run: it is not in use, merged, or in a disabled block.",
        "Call use or unmerge, or leave the block.",
    ),
    "copy-without": Code(
        "warning",
        "A copy of an adapted module (an average, a teacher) stands in the model without adapters.",
        "Make the copy after inject, or inject there too; where it is to be the base, it is meant.",
    ),
    "left-alone": Code(
        "note",
        "A pattern would have adapted it, and inject could not.",
        "Exclude it, or adapt it as the reason says.",
    ),
    "replaced": Code(
        "error",
        "An adapter had something on it, and it was replaced or taken out since.",
        "Put it back, or inject there again; freeze(model) takes the model as it is.",
    ),
    "came": Code(
        "warning",
        "It came into the model since inject, and no adapter knows of it.",
        "Inject there too; freeze(model, train_also=...) trains and saves it with an adapter.",
    ),
    "class-changed": Code(
        "error",
        "The layer has another class since, and its adapter does not run.",
        "Undo that, or do it before inject.",
    ),
    "forward-changed": Code(
        "warning",
        "A forward was set on the layer itself since, which may pass its adapter by.",
        "Take it off: del layer.forward.",
    ),
    "other-base": Code(
        "error",
        "The weight is not the one that the adapter was made for.",
        "Load the base that it was trained on.",
    ),
    "missing-beside": Code(
        "error",
        "The adapter was trained on top of another one that is not in use here.",
        "Load that one too and put both in use.",
    ),
    # --- A and B -------------------------------------------------------------------------------
    "dead": Code(
        "error",
        "A and B are both zero: neither ever gets a gradient.",
        "Call reset_lora_parameters, or load the adapter again.",
    ),
    "unmoved": Code(
        "warning",
        "The adapter was trained, and here it is still exactly as it began.",
        "Look for no-gradient here; exclude the layer where nothing reaches it.",
    ),
    "on-meta": Code(
        "error",
        "The adapter is on the meta device and has no values.",
        "Call to_empty, load the base, then load the adapter or call reset_lora_parameters.",
    ),
    "device-apart": Code(
        "error",
        "The adapter is on another device than its layer.",
        "Move the model as a whole: model.to(device).",
    ),
    "fp16-trains": Code(
        "warning",
        "It trains in float16: GradScaler refuses that, and without it small gradients vanish.",
        "Keep what trains in float32: dtype=torch.float32, and autocast around the forward.",
    ),
    # --- what trains ---------------------------------------------------------------------------
    "nothing-trains": Code(
        "error", "No parameter of the model requires a gradient.", "Call use or freeze."
    ),
    "thawed": Code(
        "error",
        "It trains, which inject had frozen: no file of an adapter holds it.",
        "freeze(model) freezes it, freeze(model, train_also=...) makes it an adapter's.",
    ),
    "frozen": Code(
        "error",
        "It was frozen since, though its adapter trains.",
        "use(model, ...) with the adapter's name lets it train again.",
    ),
    "stale-gradient": Code(
        "warning",
        "It is frozen and holds a gradient, by which an optimizer would go on changing it.",
        "Set .grad = None, or call freeze, which does.",
    ),
    "part-in-training": Code(
        "warning",
        "A part is in training mode though the model is in eval mode: its dropout is alive.",
        "Call model.eval() or model.train() on the whole.",
    ),
    # --- the optimizer -------------------------------------------------------------------------
    "not-optimized": Code(
        "error",
        "It trains, and the optimizer has not got it.",
        "Make the optimizer after inject, of lora_parameters or param_groups.",
    ),
    "optimized-frozen": Code(
        "warning",
        "It is frozen, and the optimizer holds it still.",
        "Give the optimizer lora_parameters(model) alone.",
    ),
    "optimized-elsewhere": Code(
        "warning",
        "The optimizer holds a parameter that is not in the model: of something replaced or "
        "stripped, or of another model.",
        "Make the optimizer anew after the model has changed.",
    ),
    "optimized-twice": Code(
        "error",
        "The optimizer has it twice, and takes two steps with it.",
        "Give each parameter once, as param_groups does.",
    ),
    "decayed": Code(
        "warning",
        "Weight decay is on a bias or a magnitude, which shrinks the layer itself.",
        "Use param_groups(model, ..., weight_decay=...).",
    ),
    "step-lost": Code(
        "warning",
        "Most of it is so large for its 16-bit type that a step of the optimizer is rounded away.",
        "Train it in float32 (dtype=torch.float32), or with a larger learning rate.",
    ),
    # --- the forward pass ----------------------------------------------------------------------
    "never-ran": Code(
        "error",
        "The layer was never called, and its adapter adds nothing.",
        'Audit with a batch that reaches it, exclude it, or inject with how="weight".',
    ),
    "bypassed": Code(
        "error",
        "The layer ran and its adapter did not: another forward was called in its place.",
        "Look at class-changed and forward-changed; take off what keeps the former forward.",
    ),
    "compiled-without": Code(
        "error",
        "A compiled graph or a trace runs the layer without its adapter.",
        "Compile after inject: torch.compiler.reset(), or trace again.",
    ),
    "other-weight": Code(
        "warning",
        "The layer ran with another weight than the one that stands in it.",
        "Look for what swaps its weight in the forward; inject after that.",
    ),
    "read-outside": Code(
        "error",
        "Its weight is used without calling the layer, so that its adapter adds nothing there.",
        'Inject with how="weight", which is seen by whoever reads the weight.',
    ),
    "tied-apart": Code(
        "warning",
        "Its weight is tied to that of a layer without the adapter: the two see different weights.",
        "Adapt both places or neither, or untie them.",
    ),
    "not-finite": Code(
        "error",
        "NaN or infinity comes up first in what this module returns.",
        "Look at its inputs, the learning rate and the dtype; audit before the first step.",
    ),
    "update-large": Code(
        "warning",
        "What the adapters add is larger than the layer's own output.",
        "Lower alpha or the learning rate, or use clip_norms.",
    ),
    "update-lost": Code(
        "warning",
        "What the adapters add is below the precision of the layer's output, which stays the same.",
        "Train longer or with a larger alpha, or run the layer in a wider type.",
    ),
    "rank-unused": Code(
        "note",
        "A maps what the layer reads to fewer directions than the rank, which it could fill.",
        "Use a smaller r here, or reset_lora_parameters.",
    ),
    "statistics-move": Code(
        "warning",
        "A frozen part's buffer moves in the forward pass, and belongs to no adapter.",
        "Put the part in eval mode, or train it (train_also) so that it is saved.",
    ),
    "parameter-written": Code(
        "error",
        "The forward pass itself writes to a parameter, and no audit puts that back.",
        "Find what writes; strip does not undo it.",
    ),
    "dropout-in-eval": Code(
        "warning",
        "Dropout is called as in training, in a module that is in eval mode.",
        "Pass training=self.training there.",
    ),
    # --- the backward pass ---------------------------------------------------------------------
    "loss-detached": Code(
        "error",
        "The loss depends on nothing that trains: it is detached, a constant, or computed under "
        "no_grad.",
        "Look for detach, .item(), no_grad or argmax between the model and the loss.",
    ),
    "loss-apart": Code(
        "error",
        "The loss depends on no output of a layer, and so on no input.",
        "Compute it of what the model returns for the batch.",
    ),
    "no-gradient": Code(
        "error",
        "It trains, its layer ran, and no gradient came: its output is not part of the loss.",
        "Look for detach or no_grad after the layer; exclude it where its output is not used.",
    ),
    "under-no-grad": Code(
        "error",
        "The layer ran without gradients, in no_grad or inference_mode inside of the model.",
        "Take that off, or exclude the layer.",
    ),
    "checkpoint-cut": Code(
        "error",
        "The layer ran in a reentrant checkpoint whose inputs need no gradient: it trains nothing.",
        "Use use_reentrant=False, or reentrant_checkpointing(model, after=...).",
    ),
    "zero-gradient": Code(
        "warning",
        "Its gradient is exactly zero, although no other part of the adapter is.",
        "Look for a mask, a gate at zero or a dead activation after the layer.",
    ),
    "gradient-not-finite": Code(
        "error",
        "Its gradient has NaN or infinity.",
        "Look for a division by zero, a square root at zero or an overflow after the layer.",
    ),
    "adapters-changed": Code(
        "warning",
        "One backward pass goes through runs of the layer with different adapters.",
        "Call backward before use, or mean it.",
    ),
    "graph-early": Code(
        "note",
        "A graph is built before the first layer that trains, which freezing should save.",
        "Look for what lets early outputs require gradients (enable_input_require_grads).",
    ),
}


def page() -> str:
    """The page of codes, in Markdown."""
    lines = [
        "# What an audit can find",
        "",
        "What each code of [an audit](audit.md) means, and what to do. Codes stay what they are.",
        "Errors come first, and `strict=True` raises on errors and warnings. (Made by",
        "`lora_inject.audit.codes.page`; a test compares.)",
        "",
        "| code | | meaning | remedy |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {c.severity} | {c.meaning} | {c.remedy} |" for name, c in CODES.items()
    ]
    return "\n".join(lines) + "\n"
