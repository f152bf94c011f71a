"""The command ``didi``: models in directories are merged, looked at, checked, edited and exported, without configuration files.

Every command calls what the YAML classes and the Python interface call.
"""

from .main import didi, main

__all__ = ["didi", "main"]
