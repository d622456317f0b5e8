"""The arithmetic of adapters, on tensors alone: no module, no adapter and no model is known here.

- ``linear``: what adapters add to a linear layer, and which way to compute it is right where.
- ``product``: a product as an autograd Function that keeps its input, and no copy of it.
- ``whole``: a layer with its adapters as one such Function.
- ``masks``: masks of dropout that are made again from seeds; ``philox`` has Triton's.
- ``hadamard``: two products element by element, of which neither is kept.
- ``embedding``: what adapters add to an embedding.
"""
