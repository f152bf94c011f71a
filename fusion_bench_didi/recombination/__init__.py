"""MERGE (Qiu et al., arXiv 2602.06552): which tasks share what, per component, as a search over two objectives.

A reconstruction from the abstract and a reading note of the paper; what is inferred is named where it is done.
"""
