"""LoRA-FA (arXiv 2308.03303): A stays as it starts and B alone trains, or the other way round.

The input of a layer need not be kept for the backward pass then: B's gradient needs ``A x`` alone.
A file says so in its metadata; to any other reader it is a plain LoRA.
"""

# What ``inject(fixed=)`` may name. Either factor keeps the update of the form ``B A``.
FIXED = ("A", "B")
# The same factor where a pair is written the other way round, as that of the transposed weight.
OTHER = {"A": "B", "B": "A", "A0": "B0", "B0": "A0", "A2": "B2", "B2": "A2", "": ""}
