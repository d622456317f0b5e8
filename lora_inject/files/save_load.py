"""Save an adapter to disk and load it into a model, in any format; strict, and all or nothing."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.drift import require_nothing_gone
from lora_inject.core.look import Look
from lora_inject.core.paths import bare
from lora_inject.errors import ArgumentError
from lora_inject.files import cautions, hub, left_out
from lora_inject.files.engines import warn_of_engines
from lora_inject.files.formats import named_format, read_adapter, read_state
from lora_inject.files.formats.data import AdapterData
from lora_inject.files.formats.storage import as_path
from lora_inject.files.loading import Loading
from lora_inject.files.portable import PortableReport, for_readers
from lora_inject.files.portable import portable as as_plain_lora
from lora_inject.files.stored import Stored
from lora_inject.files.token_rows import warn_of_unsaved_rows
from lora_inject.own import Model
from lora_inject.settings import check_adapter, check_count
from lora_inject.sharding import is_distributed, on_first_rank
from lora_inject.training.freeze import freeze_adapter


def save(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    adapter: str | None = None,
    format: str = "peft",
    portable: bool = False,
    r: int | None = None,
    error: float = 0.0,
    push_to_hub: str | None = None,
) -> PortableReport | None:
    """Save an adapter: A, B, and the biases and modules that it trained.

    The default is a PEFT directory, which PEFT, vLLM and diffusers read, with a model card
    (``README.md``) that says what the adapter is. A save that is interrupted leaves the files that
    were there. Of a sharded model all ranks must call this; what is the adapter's is gathered, and
    the first rank writes. What trains beside what was injected, such as the head of a backbone, is
    not in the file: a ``LoRAInjectWarning`` names it. What was thawed or put into the injected part
    since would be lost, and is refused.

    Example:
        >>> save(model, "adapter")  # doctest: +SKIP

    Args:
        model: an adapted model, or a wrapper that holds it.
        path: a directory for "peft" and "diffusers", a file for the others; made if need be. What a
            directory of diffusers holds of other components of a pipeline stays in it.
        adapter: the adapter's name; None for the only one there is, or the only one in use.
        format: "peft", "loralib" (a .pt file), "kohya", "diffusers" or "gguf" (for llama.cpp). The
            names are those that the tools know: ``save_pipeline`` tells an SDXL's first text
            encoder from an SD 1.5's.
        portable: write a plain LoRA with one rank and a scaling of 1 for all layers, for readers
            that know nothing else (SGLang, llama.cpp): ranks are padded with zeros, scalings folded
            into B, and what is no product of low rank (DoRA) becomes the best one of rank r. In a
            PEFT directory experts stand one by one, by the names of the model's checkpoint, and
            what engines read as one (q, k, v; gate, up; experts) is there as a whole, with zeros.
            Loaded again, all that was adapted trains. Without it, a warning names engines that
            would misread the file.
        r: for ``portable``, the largest rank to write; None writes all of it, where it has a rank.
        error: how much of the change of a weight may be lost by that, relative to its norm.
        push_to_hub: ``"user/name"``: upload the directory to this repository of the Hugging Face
            hub too, which is made if need be, with ``huggingface_hub`` and the login that it knows.

    Returns:
        What was lost, weight by weight, where ``portable``; else None.

    Raises:
        ArgumentError: the format or the adapter is not known.
        FormatError: the format has no word for something of the adapter, or the path cannot be
            written to. Nothing has been written then.
        LoRAInjectError: the model has no adapters, is merged or inside a block, or a layer of the
            adapter was replaced since, or something was thawed or came since and trains; or the
            upload failed, of what is saved then.
    """
    named_format(format, "format")
    if push_to_hub is not None:
        hub.require_uploadable(push_to_hub, format)
    file, stored = as_path(path), Stored(model, adapter)
    whole = data = stored.data()
    report = None
    if portable:
        data, report = as_plain_lora(
            stored, data, None if r is None else check_count(r, "r"), error
        )
    elif r is not None or error:
        raise ArgumentError("r and error are for portable=True.")
    require_nothing_gone(stored.look, stored.name)
    left_out.require_nothing_left_out(stored.look, "the file")
    cautions.warn_of_directory(file, format)
    cautions.warn_of_untrained(whole, stored.name)
    data = for_readers(data, format, portable, bare(model), stored.modules)
    if format == "peft" and not portable:
        warn_of_engines(data, stored.name, bare(model), stored.modules)
    write(stored, data, file, format)
    if push_to_hub is not None:
        on_one_rank([stored], partial(hub.upload, file, push_to_hub))
    return report


def write(stored: Stored, data: AdapterData, file: Path, format: str = "peft") -> None:
    """Write what is saved of an adapter, on the first rank of those that hold its shards."""
    warn_of_unsaved_rows(stored.look, stored.paths, data.tensors)
    left_out.warn_of_unsaid_others(data, stored.name, format)
    on_one_rank([stored], partial(named_format(format, "format").write, data, file))


def on_one_rank(adapters: Iterable[Stored], action: Callable[[], object]) -> None:
    """Do something once: on the first rank of those that hold shards of adapters."""
    if any(is_distributed(tensor) for own in adapters for tensor in own.tensors().values()):
        on_first_rank(action)
    else:
        action()


def load(
    model: Model,
    path: str | PathLike[str] | Mapping[str, Tensor],
    *,
    adapter: str = "default",
    format: str | None = None,
    config: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    dtype: torch.dtype | str | None = None,
    other_base: bool = False,
    trainable: bool = True,
) -> Model:
    """Load an adapter, into the one of this name if the model has it, else as a new one.

    Values that fill an adapter keep its Parameters, so that an optimizer and a compiled model stay
    valid; a smaller rank is padded with zeros, and another scaling goes into B. A new adapter is in
    use at once if no other is; otherwise it waits for ``use``. Every tensor of the file must have
    its place and every place its tensor.

    Example:
        >>> load(model, "adapter")  # doctest: +SKIP

    Args:
        model: any model.
        path: what ``save``, PEFT, diffusers, loralib, kohya's scripts or other tools for images
            wrote; the directory of a whole model with A and B in it, as ``save_pretrained`` and
            ``Trainer.save_model`` write it; the name of a repository of the Hugging Face hub,
            ``"user/name"``, where there is no such path; or the tensors themselves, as
            ``lora_state_dict(model, format="peft")`` gives them. Of a file for a whole pipeline the
            model's part is taken, and a warning says what is left (``load_pipeline`` takes all).
        adapter: the name to load it under.
        format: "peft", "loralib", "kohya" or "diffusers"; None finds out.
        config: for tensors that come without a file from PEFT or diffusers, their config as a
            mapping (``LoraConfig.to_dict()``).
        alpha: for files that do not say it, as loralib's; scaling is alpha / r.
        dtype: of a new adapter's A and B, as in ``inject``; None follows the base where the one
            that was saved did.
        other_base: load although the model is not the base that the adapter was made for.
        trainable: whether the adapter trains if it is in use; False freezes it, for inference or
            below another one, until ``use`` or ``freeze`` says otherwise.

    Returns:
        The same model.

    Raises:
        ArgumentError: an argument cannot be used.
        FormatError: the file is not there, not whole or not safe, or does not fit the model; with
            counts and examples. Nothing has changed then.
        UnsupportedLayerError: a layer of the file cannot be adapted in this model.
        LoRAInjectError: the model is merged or inside a block.
    """
    adapter = check_adapter(adapter)
    with torch.inference_mode(False), torch.no_grad():  # tensors made in it could never train
        look = Look(model)
        look.require_awake()
        if isinstance(path, Mapping):
            data = read_state(path, format, config, look.index, alpha)
        elif config is not None:
            raise ArgumentError("config goes with tensors; a file has its own.")
        else:
            file = hub.found(as_path(path))
            data = read_adapter(file, format, look.index, alpha)
            cautions.warn_of_checkpoint(data, file)
        loading = Loading(look, data, adapter, dtype, other_base)
        loading.apply()
        loading.warn()
        left_out.warn_of_left_parts(data)
        if not trainable:
            freeze_adapter(model, adapter)
    return model
