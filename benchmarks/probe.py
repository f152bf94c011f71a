"""How much the output of a model reacts to each of its matrices, measured without data.

A model is fed synthetic inputs (images with the 1/f amplitude spectrum of natural ones, or random tokens). For a random
direction v of the normalized output f the gradient G = d(v . f)/dW tells how an error D of the weights moves the output:
E (v . df)^2 = E <G, D>^2, which for an isotropic D is ``||D||^2 * mean(G^2)``. That mean is the *sensitivity* of the
matrix, a Gauss-Newton weight with one number per matrix. It works on parameters, so it needs no knowledge of modules.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def pink_images(
    count: int, channels: int, height: int, width: int, *, generator: torch.Generator
) -> Tensor:
    """(count, channels, height, width) noise of unit variance with amplitudes 1 / frequency."""
    noise = torch.randn(count, channels, height, width, generator=generator)
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.fftfreq(width)[None]
    radius = (fy.square() + fx.square()).sqrt()
    radius[0, 0] = radius.flatten()[1]
    images = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    return images / images.std()


def probe_inputs(model: nn.Module, count: int, *, seed: int = 0) -> list[Any]:
    """Synthetic inputs, one sample each, for vision towers and language models.

    Raises:
        ValueError: if the model does not tell what it takes.
    """
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    if getattr(config, "image_size", None):
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        images = pink_images(count, channels, side, side, generator=generator)
        return list(images.split(1))
    if getattr(config, "vocab_size", None):
        tokens = torch.randint(config.vocab_size, (count, 32), generator=generator)
        return list(tokens.split(1))
    raise ValueError(
        f"Cannot make inputs for {type(model).__name__}: its config has neither image_size nor "
        "vocab_size."
    )


def output_of(result: Any) -> Tensor:
    """The main output of a forward pass as one vector of unit norm."""
    for name in ("pooler_output", "logits", "last_hidden_state"):
        value = getattr(result, name, None)
        if isinstance(value, Tensor):
            result = value
            break
    flat = result.reshape(-1).float()
    return flat / flat.norm().clamp(min=1e-12)


def output_gradients(
    model: nn.Module, names: Sequence[str], inputs: Iterable[Any], *, seed: int = 1
) -> Iterable[Mapping[str, Tensor]]:
    """Per input, the gradient of a random direction of the output with respect to each named parameter."""
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    device = chosen[0].device
    generator = torch.Generator().manual_seed(seed)
    flags = [p.requires_grad for p in chosen]
    model.eval()
    try:
        for p in chosen:
            p.requires_grad_(True)
        for x in inputs:
            output = output_of(model(x.to(device)))
            direction = torch.randn(output.shape, generator=generator).to(device)
            gradients = torch.autograd.grad(
                output @ direction, chosen, allow_unused=True
            )
            yield {
                name: torch.zeros_like(p) if g is None else g.detach()
                for name, p, g in zip(names, chosen, gradients)
            }
    finally:
        for p, flag in zip(chosen, flags):
            p.requires_grad_(flag)


def sensitivity(
    model: nn.Module, names: Sequence[str], *, samples: int = 32, seed: int = 0
) -> dict[str, float]:
    """Mean squared gradient of the output per entry of each named parameter.

    Args:
        model: the base model.
        names: parameters; names of buffers are left out of the result.
        samples: synthetic inputs.

    Raises:
        ValueError: if no inputs can be made for the model.
    """
    held = {name for name, _ in model.named_parameters()}
    names = [name for name in names if name in held]
    total = dict.fromkeys(names, 0.0)
    inputs = probe_inputs(model, samples, seed=seed)
    for gradients in output_gradients(model, names, inputs, seed=seed + 1):
        for name, g in gradients.items():
            total[name] += float(g.double().square().mean()) / samples
    return total
