"""The learning rate of each method of the quality benchmark, and how it was found."""

from benchmarks.methods import PEFT, RANKS

# The methods that came later, and what search() found of them: the mean Pearson correlation on
# the validation words by learning rate. Their grid was (5e-3, 1e-2, 2e-2), and went on where the
# best was at an end of it.
FOUND = {
    f"LoRA r=4{PEFT}": {5e-3: 0.8287, 1e-2: 0.8341, 2e-2: 0.8306},
    "rsLoRA r=16": {1e-3: 0.8235, 2e-3: 0.8363, 5e-3: 0.8357, 1e-2: 0.4935, 2e-2: -0.2139},
    f"rsLoRA r=16{PEFT}": {2e-3: 0.8359, 5e-3: 0.8369, 1e-2: 0.3225},
    "DoRA r=4": {5e-3: 0.8264, 1e-2: 0.8375, 2e-2: 0.8234},
    f"DoRA r=4{PEFT}": {5e-3: 0.8294, 1e-2: 0.8371, 2e-2: 0.8388, 5e-2: 0.2665},
    "PiSSA r=4": {5e-3: 0.8285, 1e-2: 0.8418, 2e-2: 0.8273},
    f"PiSSA r=4{PEFT}": {5e-3: 0.8337, 1e-2: 0.8408, 2e-2: 0.8286},
    "EVA r=4 on average": {5e-3: 0.8242, 1e-2: 0.8365, 2e-2: 0.8281},
    f"EVA r=4 on average{PEFT}": {5e-3: 0.8271, 1e-2: 0.8381, 2e-2: 0.8344},
    "LoRA-FA r=4": {5e-3: 0.7931, 1e-2: 0.8063, 2e-2: 0.8134, 5e-2: 0.8190, 1e-1: 0.8147},
    f"LoRA-FA r=4{PEFT}": {
        5e-3: 0.7883,
        1e-2: 0.8028,
        2e-2: 0.8119,
        5e-2: 0.8174,
        1e-1: 0.8227,
        2e-1: 0.7468,
    },
}
GRID = {
    **{name: tuple(of_rate) for name, of_rate in FOUND.items()},
    **{f"LoRA r={r}": (2e-3, 5e-3, 1e-2, 2e-2) for r in RANKS},
    "head only": (1e-2, 3e-2, 1e-1),
    "full fine-tuning": (1e-4, 3e-4, 1e-3),
}
RATES = {  # the best of GRID
    "head only": 3e-2,
    **{f"LoRA r={r}": 1e-2 for r in RANKS},
    "full fine-tuning": 3e-4,
    **{name: max(of_rate, key=of_rate.__getitem__) for name, of_rate in FOUND.items()},
}
