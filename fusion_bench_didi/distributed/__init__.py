"""Several processes at one merge: who they are (``ranks.py``) and which of them works on which tensor (``ownership.py``).

Fabric, ``torchrun`` or SLURM start them; on one process nothing here does anything.
"""
