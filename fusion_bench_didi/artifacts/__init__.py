"""Artifacts: any merged model, ours or not, saved at exactly the size that its account says, and loaded.

Loaded at first use: :mod:`.host_moe` needs the host's mixtures of experts.
"""

from typing import TYPE_CHECKING

from ..compat import lazy

if TYPE_CHECKING:
    from .saving import load_artifact, save_artifact

__all__ = ["load_artifact", "save_artifact"]
__getattr__ = lazy(__name__, dict.fromkeys(__all__, "saving"))
