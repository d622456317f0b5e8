"""Whether a live model really trains what it was given: what stands still, and what one run shows.

``codes`` is what can be found, ``checks`` the table of who finds it.
"""
