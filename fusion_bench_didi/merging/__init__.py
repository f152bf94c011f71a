"""The merge: inventory and settings, storage forms that compete for every matrix, ranks, and encoding (``pipeline``)."""
