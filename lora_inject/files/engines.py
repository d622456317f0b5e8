"""What engines that serve adapters make of a PEFT directory otherwise than it is meant.

Read in the code of vLLM 0.33 (lora/), SGLang 0.5.23 (srt/lora/) and llama.cpp
(convert_lora_to_gguf.py).
None of them says a word in these cases, or they fail where the adapter is first used.
"""

from collections.abc import Iterator, Mapping

from torch import nn

from lora_inject.errors import warn
from lora_inject.files.checkpoint_names import differs_in_checkpoint
from lora_inject.files.formats.data import AdapterData, PairData
from lora_inject.files.formats.pairs import config_rank
from lora_inject.files.packed import GATE_UP, QKV, fused_weights, partners

_SERVED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def warn_of_engines(
    data: AdapterData, name: str, model: nn.Module, modules: Mapping[str, nn.Module]
) -> None:
    """Warn of engines that would misread a PEFT directory of a language model.

    Args:
        data: what is written.
        name: the adapter's.
        model: the model, without wrappers.
        modules: its modules by path.
    """
    if not data.model_class.endswith(_SERVED) or data.task == "SEQ_2_SEQ_LM":
        return
    plain = [pair for pair in data.pairs if pair.variant == "lora"]
    found = [*_of_scalings(plain), *_of_groups(plain, modules), *_of_experts(plain, model, modules)]
    if found:
        warn(
            f"{name!r} would be misread by {'; by '.join(found)}. For these engines, save it "
            "with portable=True."
        )


def _of_scalings(pairs: list[PairData]) -> Iterator[str]:
    """Engines that know one rank and one alpha for all."""
    if len({config_rank(pair) for pair in pairs}) > 1 or len({p.scaling for p in pairs}) > 1:
        yield "SGLang and llama.cpp, which know one rank or alpha for all layers"
    elif any(pair.rule != "lora" and pair.rank > 1 for pair in pairs):
        yield "SGLang and llama.cpp, which scale by alpha / r and not as rsLoRA does"


def _of_groups(pairs: list[PairData], modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """SGLang, which takes k and v where there is a q, and up where there is a gate."""
    there = {pair.path for pair in pairs}
    for path in sorted(there):
        group = partners(path, modules)
        names = {own.rpartition(".")[2] for own in group if own in there}
        first, last = (QKV[0], QKV[-1]) if len(group) == len(QKV) else (GATE_UP[0], GATE_UP[0])
        if group and not {first, last} <= names:
            wanted = " and ".join(dict.fromkeys((first, last)))
            yield f"SGLang, which fails at {path} without {wanted} beside it"
            return


def _of_experts(
    pairs: list[PairData], model: nn.Module, modules: Mapping[str, nn.Module]
) -> Iterator[str]:
    """Engines that read experts one by one, by the names of checkpoints; gate, up and down."""
    experts = [pair for pair in pairs if pair.form == "experts" and pair.path in modules]
    if other := differs_in_checkpoint(experts, model, modules):
        yield f"vLLM, SGLang and llama.cpp, which call {other[0]} otherwise ({other[1]})"
        return
    there = {(pair.path, pair.weight) for pair in experts}
    for pair in experts:
        missing = [w for w in fused_weights(modules[pair.path]) if (pair.path, w) not in there]
        if missing and pair.A.dim() == 3:
            yield f"vLLM, which fails at {pair.name} without {missing[0]} beside it"
            return
