"""Which way the weight of a layer lies, and what PEFT's layers compute of those that they are put around."""

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


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is (in, out): transformers' ``Conv1D``, of GPT-2, or a copy of it."""
    return type(module).__name__ == "Conv1D"


def fan_in_first(model: nn.Module) -> frozenset[str]:
    """Names of the weights that are (in, out)."""
    named = model.named_modules()
    return frozenset(f"{name}.weight" for name, module in named if is_conv1d(module))
