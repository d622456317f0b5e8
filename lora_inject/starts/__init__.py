"""Where A and B begin. A new start is a file of its own and a line in the table here."""

from lora_inject.starts.default import Start
from lora_inject.starts.gaussian import Gaussian
from lora_inject.starts.mica import MiCA
from lora_inject.starts.olora import OLoRA
from lora_inject.starts.pissa import MiLoRA, PiSSA
from lora_inject.starts.saved import Saved

__all__ = ["STARTS", "Gaussian", "MiCA", "MiLoRA", "OLoRA", "PiSSA", "Saved", "Start"]

STARTS: dict[str, type[Start]] = {
    start.name: start for start in (Start, Gaussian, PiSSA, MiLoRA, OLoRA, MiCA)
}
