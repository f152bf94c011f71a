"""Who gets how many bits: rate-distortion curves, the Lagrangian choice between them, and ranks by reverse water-filling.

A matrix's rank is chosen in ``water_filling`` (or ``learned``, Eq. 7-13), its form and precision in ``lagrangian``; ``leftover``
spends the rest.
"""
