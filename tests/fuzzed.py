"""Files changed at random: in their bytes, in the JSON of them, in their tensors.

Every function takes the ``random.Random`` that chooses, which can be hypothesis's.
"""

import copy
import io
import json
import struct

import torch
from safetensors.torch import load, save

# What a reader may find in the place of any value.
HOSTILE = [
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, 2**31, 2**63, 10**30, 10**400, 1e308, float("inf"),
    float("nan"), "", " ", "a", "0", "q_proj", "../../etc/passwd", "re:(", "(?R)", "(?V0V1)a",
    "a{9999999}", "(a{999}){999}", "(a|aa)+$", "\x00", "\ud800", "x" * 5000, "9" * 5000, [], [[]],
    [None], ["q_proj"], [1, 2], [-1], {}, {"a": {}}, {"q_proj": 2}, {"": ""},
    {"q_proj": [0.5, 0.5]},
]  # fmt: skip
TENSORS = [
    torch.ones(()), torch.ones(0), torch.ones(0, 8), torch.ones(1), torch.ones(2, 8),
    torch.ones(8, 2), torch.ones(2, 2, 2), torch.ones(1, 1, 1, 1, 1, 1), torch.full((2, 8), 1e38),
    torch.full((8, 2), float("nan")), torch.ones(2, 8, dtype=torch.int64),
    torch.ones(8, 2, dtype=torch.bool), torch.ones(2, 8, dtype=torch.complex64),
    torch.ones(2, 8, dtype=torch.float64), torch.ones(2, 8).to(torch.float8_e4m3fn),
    torch.ones(16, 0), torch.ones(3, 0, 3),
]  # fmt: skip


def places(value, path=()):
    """The paths to everything inside of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key, item in sorted(value.items()) if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def changed_json(random, value):
    """A JSON value with one thing in it replaced, dropped, renamed or put into another."""
    value, new = copy.deepcopy((value, random.choice(HOSTILE)))
    path = random.choice(list(places(value)))
    if not path:
        return new
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    how = random.choice(["replace", "replace", "drop", "rename", "wrap"])
    if how == "replace":
        owner[path[-1]] = new
    elif how == "wrap":
        owner[path[-1]] = random.choice([[owner[path[-1]]], {"a": owner[path[-1]]}])
    elif how == "drop" or isinstance(owner, list):
        owner.pop(path[-1])
    else:
        name = new if isinstance(new, str) else random.choice(sorted(owner))
        owner[name] = owner[path[-1]] if random.random() < 0.5 else owner.pop(path[-1])
    return value


def changed_bytes(random, data):
    """Bytes with some of them flipped, cut off, dropped or doubled."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        # Most of what can be misread stands in front.
        at = random.randint(0, random.choice([len(data), min(len(data), 600)]))
        size, how = random.randint(1, 40), random.choice(["flip", "set", "cut", "drop", "double"])
        if how == "flip" and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif how == "set":
            data[at : at + size] = bytes(random.randrange(256) for _ in range(size))
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    return bytes(data)


def changed_tensors(random, tensors):
    """Tensors of which some are replaced, renamed, dropped, put twice, spoilt or turned."""
    tensors = dict(sorted(tensors.items()))  # files hold them in any order
    for _ in range(random.randint(1, 3)):
        if not tensors:
            break
        name = random.choice(sorted(tensors))
        how = random.choice(["replace", "drop", "rename", "twice", "spoil", "turn"])
        pieces = name.split(".")
        if how == "replace":
            tensors[name] = random.choice(TENSORS).clone()
        elif how == "drop":
            del tensors[name]
        elif how in ("rename", "twice"):
            random.shuffle(pieces)
            some = pieces if random.random() < 0.3 else [p for p in name.split(".")
                                                         if random.random() < 0.7]  # fmt: skip
            new = ".".join(some) or random.choice(["", ".", "alpha", "lora_A", "x"])
            tensors[new] = tensors[name].clone() if how == "twice" else tensors.pop(name)
        elif how == "spoil" and tensors[name].is_floating_point() and tensors[name].numel():
            value = random.choice([float("nan"), float("inf"), -1e38, 0.0])
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[0] = value
        elif tensors[name].dim() == 2:
            tensors[name] = tensors[name].t().contiguous()
    return tensors


def _parts(data):
    """The header of a safetensors file, and what comes after it."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(header, rest):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def _changed_header(random, data):
    header, rest = _parts(data)
    return _joined(changed_json(random, header), rest)


def _changed_metadata(random, data):
    """The JSON that stands as text in the metadata of a safetensors file."""
    header, rest = _parts(data)
    told = header.get("__metadata__", {})
    nested = sorted(key for key, text in told.items() if text.startswith("{"))
    if not nested:
        return _changed_header(random, data)
    key = random.choice(nested)
    told[key] = json.dumps(changed_json(random, json.loads(told[key])))
    return _joined(header, rest)


def _changed_values(random, data):
    """A safetensors file with other tensors; its metadata stays, or goes."""
    header, _ = _parts(data)
    told = header.get("__metadata__") if random.random() < 0.5 else None
    return save(changed_tensors(random, load(data)), told)


def _changed_pickle(random, data):
    buffer = io.BytesIO()
    torch.save(changed_tensors(random, torch.load(io.BytesIO(data))), buffer)
    return buffer.getvalue()


def _changed_config(random, data):
    value = json.loads(data)
    for _ in range(random.randint(1, 2)):
        value = changed_json(random, value)
    return json.dumps(value).encode()


_WAYS = {
    "safetensors": (changed_bytes, _changed_header, _changed_metadata, _changed_values),
    "json": (changed_bytes, _changed_config, _changed_config),
    "pt": (changed_bytes, _changed_pickle),
    "bin": (changed_bytes, _changed_pickle),
}


def changed_file(random, name, data):
    """The bytes of a file, changed in one of the ways that its format allows."""
    return random.choice(_WAYS.get(name.rpartition(".")[2], (changed_bytes,)))(random, data)
