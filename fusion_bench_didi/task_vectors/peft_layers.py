"""What PEFT's layers compute of the modules that they are put around, where that is not a change of the weight alone."""

from torch import nn


def computed_otherwise(module: nn.Module) -> str:
    """Why factors that PEFT puts on an embedding or a convolution do not change its weight alone; empty where they do."""
    kind = type(module)
    if isinstance(module, nn.Conv2d):
        if kind is not nn.Conv2d:
            return as_plain(kind, nn.Conv2d)
        if module.padding_mode != "zeros" or set(module.dilation) != {1}:
            return "a convolution with dilation or a mode of padding, which PEFT leaves out of factors"
    if isinstance(module, nn.Embedding):
        if kind.forward is not nn.Embedding.forward and not _scaled_by_peft(module):
            return as_plain(kind, nn.Embedding)
        if module.max_norm is not None:
            return "an embedding with max_norm, by which PEFT bounds factors"
    return ""


def as_plain(kind: type[nn.Module], plain: type[nn.Module]) -> str:
    """Why PEFT's layer computes something else than a class of its own forward."""
    return f"a {kind.__name__}, which PEFT takes for a plain {plain.__name__}"


def _scaled_by_peft(module: nn.Module) -> bool:
    """Whether a module is an embedding with a scale that PEFT, if it is recent, applies to factors too."""
    from peft.tuners.lora.layer import LoraLayer

    return hasattr(module, "embed_scale") and hasattr(LoraLayer, "_get_embed_scale")


def fan_in_first(model: nn.Module) -> frozenset[str]:
    """The weights that are (in, out), those of transformers' ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    )
