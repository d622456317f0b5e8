"""What adapted models compute, as hashes: proof that a change of the library changes no bit.

    python tests/output_hashes.py record before.json    # on the old code
    python tests/output_hashes.py compare before.json   # on the new code, on the same machine

Of every family of ``families.py``, adapted in its targets and in ``"all-linear"``, in float32 and
bfloat16: the names and bytes of A and B as they start, the output and the gradients after they have
values that matter, the merged weights, and the outputs with a second adapter and without any.
Another CPU or another torch may compute other bits, so that no file of hashes is kept here.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from families import FAMILIES
from helpers import randomize_adapters, raw

from lora_inject import disabled, inject, merge, strip, unmerge, use


def digest(named):
    """One hash of tensors by name."""
    found = hashlib.sha256()
    for name, tensor in named:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(raw(tensor.contiguous()))
    return found.hexdigest()[:16]


def output(model, inputs):
    return [("output", model(**inputs)[0])]


def hashes_of(family, targets, dtype):
    """By what was computed: its hash."""
    torch.manual_seed(0)
    model, inputs = family.build().to(dtype).eval(), family.inputs()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    found = {"base": digest(output(model, inputs))}
    inject(model, targets, r=3, alpha=5, seed=7)
    found["start"] = digest((n, p) for n, p in model.named_parameters() if p.requires_grad)
    torch.manual_seed(1)
    randomize_adapters(model)
    found["output"] = digest(output(model, inputs))
    model(**inputs)[0].float().pow(2).sum().backward()
    trained = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    found["gradients"] = digest(trained)
    inject(model, targets, r=2, adapter="other", bias="lora_only", seed=8)
    use(model, {"default": 0.7, "other": 1.0})
    found["two"] = digest(output(model, inputs))
    merge(model)
    found["merged"] = digest([*model.state_dict().items(), *output(model, inputs)])
    unmerge(model)
    with disabled(model):
        found["disabled"] = digest(output(model, inputs))
    strip(model)
    found["stripped"] = digest([*model.state_dict().items(), *output(model, inputs)])
    return found


def all_hashes():
    return {
        f"{name}, {targets or 'all-linear'}, {dtype}, {what}": value
        for name, family in FAMILIES.items()
        for targets in (list(family.targets), None)
        for dtype in (torch.float32, torch.bfloat16)
        for what, value in hashes_of(family, targets or "all-linear", dtype).items()
    }


def main():
    action, path = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    found = all_hashes()
    if action == "record":
        path.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} hashes written to {path}")
        return
    before = json.loads(path.read_text())
    changed = [key for key in before.keys() | found.keys() if before.get(key) != found.get(key)]
    print(f"{len(changed)} of {len(before)} differ", *sorted(changed), sep="\n  ")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
