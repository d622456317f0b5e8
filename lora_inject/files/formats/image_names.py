"""How tools for images name the modules of a model: one table, by which files are read and written.

A style is one way of naming. Of the paths of a model it makes the tool's names, with dots, and for
each of them our modules that it stands for: mostly one, several where theirs is fused. Kohya's form
of a name has underscores for the dots, and other tools' one has a component in front.

Where the names come from: ComfyUI 0.38 (comfy/lora.py, comfy/utils.py), kohya's sd-scripts 0.9.1
(networks/lora.py, lora_flux.py, convert_flux_lora.py, library/sdxl_model_util.py), A1111
(extensions-builtin/Lora/networks.py), diffusers 0.42 (loaders/lora_conversion_utils.py,
utils/state_dict_utils.py), ai-toolkit of August 2026 (toolkit/lora_special.py, network_mixins.py).
"""

import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple


class Slot(NamedTuple):
    """One of our modules in what a tool has as one.

    Attributes:
        path: the module.
        exchanged: whether the two halves of its outputs stand the other way round there.
    """

    path: str
    exchanged: bool = False


Named = dict[str, tuple[Slot, ...]]  # our modules by the tool's name
Style = Callable[[Collection[str]], Named]


def own(paths: Collection[str]) -> Named:
    """The names that the modules have: diffusers', and kohya's and ai-toolkit's of most models."""
    return {path: (Slot(path),) for path in paths if path}


# --- the UNets of Stable Diffusion ----------------------------------------------------------------

_SAI = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_SAI_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def sai(paths: Collection[str]) -> Named:
    """The UNet's names in the checkpoints of Stability AI, which kohya's files of SDXL have."""
    tops = {**_SAI, **dict(_sai_blocks(paths))}
    names: Named = {}
    for path in paths:
        for top in prefixes(path):
            if top in tops:
                inside = path[len(top) :]
                if ".resnets." in top and inside.strip("."):
                    inside = "." + _SAI_RESNET.get(inside[1:], inside[1:])
                names[tops[top] + inside] = (Slot(path),)
                break
    return names


def _sai_blocks(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """What the blocks of a UNet are called: all blocks of a side are counted through.

    A block has an index for each resnet, with the attention behind it as its second part, and on
    the way down one more for its downsampler. An upsampler is the last part of the block before it.
    """
    there = {top for path in paths for top in prefixes(path)}
    for side, name, n in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for x in _counted(f"{side}_blocks.{{}}", there):
            block, attention = f"{side}_blocks.{x}", False
            for i in _counted(f"{block}.resnets.{{}}", there):
                attention = f"{block}.attentions.{i}" in there
                yield f"{block}.resnets.{i}", f"{name}.{n}.0"
                yield f"{block}.attentions.{i}", f"{name}.{n}.1"
                n += 1
            if side == "down":
                yield f"{block}.downsamplers.0.conv", f"{name}.{n}.0.op"
                n += 1
            else:
                part = 2 if attention else 1
                yield f"{block}.upsamplers.0.conv", f"{name}.{n - 1}.{part}.conv"


def prefixes(path: str) -> Iterator[str]:
    """A path and all that it lies in."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _counted(name: str, there: Collection[str]) -> Iterator[int]:
    """The indices from 0 with which a name is there."""
    i = 0
    while name.format(i) in there:
        yield i
        i += 1


# --- Flux ---------------------------------------------------------------------------------------

# Theirs, and what it is here: several modules one below the other in a fused one; "~" in front of
# one whose two halves are exchanged.
_BFL = """
double_blocks.{}.img_attn.qkv    transformer_blocks.{}.attn: to_q to_k to_v
double_blocks.{}.txt_attn.qkv    transformer_blocks.{}.attn: add_q_proj add_k_proj add_v_proj
double_blocks.{}.img_attn.proj   transformer_blocks.{}.attn: to_out.0
double_blocks.{}.txt_attn.proj   transformer_blocks.{}.attn: to_add_out
double_blocks.{}.img_mod.lin     transformer_blocks.{}: norm1.linear
double_blocks.{}.txt_mod.lin     transformer_blocks.{}: norm1_context.linear
double_blocks.{}.img_mlp.0       transformer_blocks.{}: ff.net.0.proj
double_blocks.{}.img_mlp.2       transformer_blocks.{}: ff.net.2
double_blocks.{}.txt_mlp.0       transformer_blocks.{}: ff_context.net.0.proj
double_blocks.{}.txt_mlp.2       transformer_blocks.{}: ff_context.net.2
single_blocks.{}.linear1  single_transformer_blocks.{}: attn.to_q attn.to_k attn.to_v proj_mlp
single_blocks.{}.linear2  single_transformer_blocks.{}: proj_out
single_blocks.{}.modulation.lin  single_transformer_blocks.{}: norm.linear
img_in                           x_embedder
txt_in                           context_embedder
time_in.in_layer                 time_text_embed.timestep_embedder: linear_1
time_in.out_layer                time_text_embed.timestep_embedder: linear_2
vector_in.in_layer               time_text_embed.text_embedder: linear_1
vector_in.out_layer              time_text_embed.text_embedder: linear_2
guidance_in.in_layer             time_text_embed.guidance_embedder: linear_1
guidance_in.out_layer            time_text_embed.guidance_embedder: linear_2
final_layer.linear               proj_out
final_layer.adaLN_modulation.1   ~norm_out.linear
"""


def bfl(paths: Collection[str]) -> Named:
    """Flux's names in the checkpoints of Black Forest Labs: kohya's files, and ComfyUI's."""
    names: Named = {}
    for line in _BFL.strip().splitlines():
        theirs, _, ours = line.partition(" ")
        above, _, inside = ours.strip().rpartition(":")
        for i in _indices(above, paths) if "{}" in above else ("",):
            slots = []
            for name in inside.split():
                path = f"{above}.{name.lstrip('~')}".lstrip(".").format(i)
                slots.append(Slot(path, name.startswith("~")))
            if all(slot.path in paths for slot in slots):
                names[theirs.format(i)] = tuple(slots)
    return names


def _indices(above: str, paths: Collection[str]) -> list[str]:
    pattern = re.compile(re.escape(above).replace(r"\{\}", r"(\d+)") + r"(?:\.|$)")
    found = (pattern.match(path) for path in paths)
    return list(dict.fromkeys(match[1] for match in found if match))


# --- older names, and text encoders ---------------------------------------------------------------

LEVEL = "text_model."  # which transformers 5 has taken away from CLIPTextModel
_OLDER = {"to_out.0": "to_out"}
_OLDER_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def older(paths: Collection[str]) -> Named:
    """The attention in the first files of diffusers: its processor has the layers there."""
    names: Named = {}
    for path in paths:
        above, found, inside = path.rpartition(".to_")
        if found:
            last = _OLDER.get(f"to_{inside}", f"to_{inside}")
            names |= {f"{above}.{part}{last}": (Slot(path),) for part in ("", "processor.")}
    return names


def text(paths: Collection[str]) -> Named:
    """The names of a text encoder of CLIP that all tools know."""
    level = "" if any(path.startswith(LEVEL) for path in paths) else LEVEL
    return {level + path: (Slot(path),) for path in paths if path}


def older_text(paths: Collection[str]) -> Named:
    """The same in diffusers' first files; and without the level, as transformers 5 has them."""
    names: Named = {}
    for name, slots in text(paths).items():
        above, _, last = name.rpartition(".")
        names[name.removeprefix(LEVEL)] = slots
        if above.endswith("self_attn") and last in _OLDER_TEXT:
            names[f"{above}.{_OLDER_TEXT[last]}"] = slots
    return names


# --- models, and what stands in front of names ----------------------------------------------------

DENOISER = "unet or transformer"


class Family(NamedTuple):
    """What is known of models by their class.

    Attributes:
        mark: what the name of the class contains.
        labels: for which parts of a pipeline it can be meant, the likely one first.
        styles: by which names it is read.
        written: by which of them it is written, for some models.
        component: the name that it has in a pipeline.
        flat: what kohya's form has in front.
    """

    mark: str
    labels: tuple[str, ...]
    styles: tuple[Style, ...]
    written: Style
    component: str
    flat: str


def _unet(paths: Collection[str]) -> Named:
    """As kohya's scripts train it: SDXL by SAI's names, and others by diffusers'."""
    return sai(paths) if "add_embedding.linear_1" in paths else own(paths)


FAMILIES = (
    Family("UNet", (DENOISER,), (own, sai, older), _unet, "unet", "lora_unet"),
    Family("FluxTransformer", (DENOISER,), (own, bfl, older), bfl, "transformer", "lora_unet"),
    Family("CLIPTextModelWithProjection", ("text_encoder_2", "text_encoder"),
           (text, older_text), text, "text_encoder_2", "lora_te2"),
    Family("CLIPTextModel", ("text_encoder", "text_encoder_2"),
           (text, older_text), text, "text_encoder", "lora_te"),
    Family("TextModel", ("text_encoder", "text_encoder_2"),
           (own, older), own, "text_encoder", "lora_te"),
    Family("T5Encoder", ("text_encoder_3", "text_encoder_2"), (own,), own, "", "lora_te3"),
    Family("Transformer", (DENOISER,), (own, older), own, "transformer", "lora_transformer"),
)  # fmt: skip
OTHERS = Family("", (), (own,), own, "", "lycoris")


def family_of(model_class: str) -> Family:
    """What is known of a model by the name of its class."""
    return next((family for family in FAMILIES if family.mark in model_class), OTHERS)


# What stands in front, and which part of a pipeline that is.
FLAT = {
    "lora_unet": DENOISER, "lora_transformer": DENOISER, "lycoris": DENOISER,
    "lora_te1": "text_encoder", "lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3",
    "lora_te": "text_encoder",
}  # fmt: skip
DOTTED = {
    "unet": DENOISER, "transformer": DENOISER, "diffusion_model": DENOISER,
    "transformer_2": "transformer_2", "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2", "text_encoder_3": "text_encoder_3",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "text_encoders.t5xxl.transformer": "text_encoder_3",
}  # fmt: skip
COMPONENTS = tuple(name for name in DOTTED if name != "diffusion_model" and "." not in name)


def labels_of(component: str, family: Family) -> tuple[str, ...]:
    """Which parts a component of a pipeline can be; "" for a model that stands alone."""
    label = DOTTED.get(component, component)
    if not component or (label == "text_encoder_2" and family.flat == "lora_te3"):
        return family.labels  # T5 is Flux's second encoder, and the third one in kohya's form
    return (label,)


def flat_prefix(component: str, encoders: int, family: Family) -> str:
    """What kohya's form has in front of the names of a component.

    Args:
        component: its name in the pipeline; "" where it stands alone.
        encoders: how many text encoders the pipeline has.
        family: what the component is.
    """
    if not component.startswith("text_encoder") or family.flat == "lora_te3":  # T5 everywhere
        return family.flat
    number = component.removeprefix("text_encoder").strip("_") or ("1" if encoders > 1 else "")
    return f"lora_te{number}"
