"""Matrices as factors: decompositions, static merges, Tucker-2 and refinement; pure functions on tensors.

``factors`` and ``factored`` are the data, ``svd`` the only caller of ``torch.linalg`` for spectra.
"""
