"""From features to scores over tasks, fitted on features of samples whose task is known.

``discriminant``  log posterior of Gaussians of one covariance, in closed form: with task means m_t and pooled covariance
                  C, shrunk towards its diagonal, ``score_t = m_t^T C^-1 f - m_t^T C^-1 m_t / 2``. Tasks count equally.
``mlp``           two layers with GELU between, trained with dropout, cross entropy and a little label smoothing.

Both take features that are standardised first. Pure functions on tensors; what they store is a dictionary of tensors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SettingsError
from ..options import Count, Fraction, Positive, PositiveCount, Seed, checked_options


def _fit_discriminant(
    features: Tensor, labels: Tensor, *, shrinkage: Fraction = 0.1
) -> dict[str, Tensor]:
    count = int(labels.max()) + 1
    x = features.double()
    means = torch.stack([x[labels == t].mean(0) for t in range(count)])  # (T, F)
    inside = x - means[labels]
    cov = inside.mT @ inside / len(x)
    spread = cov.diagonal().clamp_min(1e-8)
    cov = (1 - shrinkage) * cov + shrinkage * torch.diag(spread)
    cov.diagonal().add_(1e-6)
    weight = torch.linalg.solve(cov, means.mT)  # (F, T)
    bias = -0.5 * (means.mT * weight).sum(0)
    return {"weight": weight.mT.float().contiguous(), "bias": bias.float()}


def _fit_mlp(
    features: Tensor,
    labels: Tensor,
    *,
    width: PositiveCount = 64,
    epochs: Count = 30,
    lr: Positive = 1e-3,
    seed: Seed = 0,
) -> dict[str, Tensor]:
    count = int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Dropout(0.2),
            nn.Linear(features.shape[1], width),
            nn.GELU(),
            nn.Dropout(0.4),
            nn.Linear(width, count),
        ).to(features.device)
        adam = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
        for _epoch in range(epochs):
            for batch in torch.randperm(len(features)).split(128):
                batch = batch.to(features.device)
                loss = F.cross_entropy(
                    net(features[batch]), labels[batch], label_smoothing=0.05
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
    names = ("weight", "bias", "out_weight", "out_bias")
    values = (net[1].weight, net[1].bias, net[4].weight, net[4].bias)
    return {name: value.detach().clone() for name, value in zip(names, values)}


#: How each kind of head is fitted.
HEADS = {"discriminant": _fit_discriminant, "mlp": _fit_mlp}


def fit_head(
    head: str, features: Tensor, labels: Tensor, **options
) -> dict[str, Tensor]:
    """The tensors of a head.

    Args:
        features: (N, F).
        labels: (N,) task positions; every task needs a sample.
        **options: keywords of the function in :data:`HEADS`.

    Raises:
        SettingsError: for options that the head does not have.
    """
    if head == "none":
        raise SettingsError(
            "A router without a head has nothing to fit. Give it one: mlp or discriminant."
        )
    fit, features = HEADS[head], features.float()
    options = checked_options(fit, options, owner=f"A router's head={head}")
    mean, scale = features.mean(0), spread_of(features, 0).clamp_min(1e-5)
    found = fit((features - mean) / scale, labels, **options)
    return {"mean": mean, "scale": scale, **found}


def head_scores(head: str, features: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """(N, T) scores of features (N, F) by the tensors of :func:`fit_head`."""
    x = (features - tensors["mean"]) / tensors["scale"]
    x = F.linear(x, tensors["weight"], tensors["bias"])
    if head == "mlp":
        x = F.linear(F.gelu(x), tensors["out_weight"], tensors["out_bias"])
    return x


def spread_of(values: Tensor, side: int) -> Tensor:
    """The standard deviation along a side; of a single value 0."""
    return values.std(side, correction=min(values.shape[side] - 1, 1))
