"""Where A and B begin. A new start is a file of its own and a line in the table here."""

from lora_inject.starts.corda import CorDA
from lora_inject.starts.custom import Custom, Function, Subtracted
from lora_inject.starts.default import Start
from lora_inject.starts.eva import EVA
from lora_inject.starts.gaussian import Gaussian
from lora_inject.starts.loftq import LoftQ
from lora_inject.starts.lora_ga import LoRAGA
from lora_inject.starts.mica import MiCA
from lora_inject.starts.olora import OLoRA
from lora_inject.starts.pissa import MiLoRA, PiSSA
from lora_inject.starts.saved import Saved

__all__ = [
    "EVA", "STARTS", "CorDA", "Custom", "Function", "Gaussian", "LoRAGA", "LoftQ", "MiCA", "MiLoRA",
    "OLoRA", "PiSSA", "Saved", "Start", "Subtracted",
]  # fmt: skip

# Those that need more than a word say so, where one is used.
STARTS: dict[str, type[Start]] = {
    start.name: start
    for start in (Start, Gaussian, PiSSA, MiLoRA, OLoRA, MiCA, EVA, CorDA, LoRAGA, LoftQ)
}
