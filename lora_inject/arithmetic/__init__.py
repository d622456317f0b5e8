"""The arithmetic of adapters, on tensors alone: no module, no adapter and no model is known here.

- ``linear``: what adapters add to a linear layer, and which way to compute it is right where.
- ``product``: those products as autograd Functions that keep inputs, and no copies of them.
- ``masks``: masks of dropout that are made again from seeds; ``philox`` has Triton's.
- ``embedding``: what adapters add to an embedding.
"""
