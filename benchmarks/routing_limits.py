"""How much of the task can be seen without any training? Signals that a training-free router could use.

    python -m benchmarks.routing_limits            # real8; docs/routing_limits.md

Signals are scores (N, T) per image: responses of expert subspaces to the inputs of the base model's layers, as they are, less
their mean over pink noise (no data), and less their mean over the stream, over their deviation there (unlabelled images, no
tasks); how sure an expert is within its own classes; and where the base model's text heads point among the classes of all
tasks. Last, how pure clusters of the base model's states are, which bounds what the stream alone could add.
"""

import argparse
from pathlib import Path

import torch
from fusion_bench.models.hf_clip import HFCLIPClassifier
from fusion_bench.tasks.clip_classification import get_classnames_and_templates
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks.probe import probe_inputs
from benchmarks.suites import Suite, machine, write_json
from fusion_bench_didi.routers.projection import rows_of

DIRECTIONS = (16, 48)
CLUSTERS = (8, 32, 128)


class Models:
    """Base and experts of a suite, and the right singular vectors of what the experts change in linear layers."""

    def __init__(self, suite: Suite):
        self.base = suite.modelpool.load_pretrained_model().eval()
        self.experts = [suite.modelpool.load_model(t).eval() for t in suite.tasks]
        self.layers: dict[str, tuple[nn.Module, Tensor]] = {}
        for name, module in self.base.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                tau = torch.stack(
                    [
                        (e.get_submodule(name).weight - module.weight).flatten(1)
                        for e in self.experts
                    ]
                )
                basis = torch.linalg.svd(tau.detach(), full_matrices=False).Vh
                self.layers[name] = module, basis[:, : max(DIRECTIONS)]

    @torch.no_grad()
    def responses(self, images: Tensor) -> dict[tuple[str, int], Tensor]:
        """Per layer and number of directions, (N, T) logarithms of the part of the input in an expert's subspace."""
        found: dict[tuple[str, int], Tensor] = {}

        def see(name: str, module: nn.Module, x: Tensor) -> None:
            rows, basis = rows_of(module, x), self.layers[name][1]
            inner = torch.einsum("bnd,tkd->bntk", rows, basis).square_().mean(1)
            energy = rows.square().sum(-1).mean(1)[:, None]
            for k in DIRECTIONS:
                found[name, k] = (inner[:, :, :k].sum(2) / energy).clamp(min=1e-9).log()

        handles = [
            module.register_forward_pre_hook(
                lambda m, args, name=name: see(name, m, args[0])
            )
            for name, (module, _) in self.layers.items()
        ]
        self.base(images)
        for handle in handles:
            handle.remove()
        return found

    @torch.no_grad()
    def states(self, images: Tensor) -> Tensor:
        """First token, mean and deviation after the first two blocks."""
        states = self.base(images, output_hidden_states=True).hidden_states[1:3]
        return torch.cat(
            [torch.cat([h[:, 0], h.mean(1), h.std(1)], 1) for h in states], 1
        )


def gathered(function, images: Tensor) -> dict:
    parts = [function(x) for x in images.split(128)]
    return {key: torch.cat([p[key] for p in parts]) for key in parts[0]}


def right(scores: Tensor, owner: Tensor) -> float:
    """Per cent of the images whose task has the largest score, mean over tasks."""
    hit = (scores.argmax(1) == owner).float()
    tasks = owner.unique()
    return 100 * float(sum(hit[owner == t].mean() for t in tasks) / len(tasks))


@torch.no_grad()
def by_heads(
    suite: Suite, models: Models, images: Tensor, owner: Tensor
) -> dict[str, float]:
    """Scores from the text heads, which know the class names of every task."""
    clip = suite.taskpool.clip_model
    head = HFCLIPClassifier(clip, suite.taskpool.processor)
    heads = []
    for task in suite.tasks:
        head.set_classification_task(*get_classnames_and_templates(task))
        heads.append(head.zeroshot_weights.detach())

    def logits(model: nn.Module, weights: Tensor) -> Tensor:
        parts = [clip.visual_projection(model(x)[1]) for x in images.split(256)]
        states = torch.cat(parts)
        states = states / states.norm(dim=-1, keepdim=True)
        return states @ weights.mT * clip.logit_scale.exp()

    among_all = [logits(models.base, w).amax(1) for w in heads]
    sure = [logits(e, w).softmax(1).amax(1) for e, w in zip(models.experts, heads)]
    return {
        "base model's text heads, all classes": right(torch.stack(among_all, 1), owner),
        "how sure an expert is (T forwards)": right(torch.stack(sure, 1), owner),
    }


def table(suite: Suite, models: Models) -> dict[str, float]:
    """Label and per cent."""
    loaders = suite.taskpool.test_dataloaders
    images = [torch.cat([batch[0] for batch in loaders[t]]) for t in suite.tasks]
    owner = torch.cat([torch.full((len(x),), t) for t, x in enumerate(images)])
    images = torch.cat(images)
    stream = gathered(models.responses, images)
    noise = gathered(models.responses, torch.cat(probe_inputs(models.base, 256)))
    found: dict[str, float] = {}
    for k in DIRECTIONS:
        keys = [key for key in stream if key[1] == k]
        ways = {
            "as they are": sum(stream[key] for key in keys),
            "less their mean over noise": sum(
                stream[key] - noise[key].mean(0) for key in keys
            ),
            "standardised over the stream": sum(
                (stream[key] - stream[key].mean(0)) / stream[key].std(0) for key in keys
            ),
        }
        for way, scores in ways.items():
            found[f"responses, {k} directions, all layers, {way}"] = right(
                scores, owner
            )
    found |= by_heads(suite, models, images, owner)
    states = torch.cat([models.states(x) for x in images.split(256)]).numpy()
    reduced = PCA(48, random_state=0).fit_transform(
        StandardScaler().fit_transform(states)
    )
    for count in CLUSTERS:
        labels = torch.tensor(
            KMeans(count, n_init=3, random_state=0).fit(reduced).labels_
        )
        most = [owner[labels == c].bincount().max() for c in range(count)]
        found[f"purity of {count} clusters"] = 100 * float(sum(most)) / len(owner)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", help="a directory, or demo")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    columns = {}
    for split in ("validation", "test"):
        suite = Suite(arguments.suite, split=split)
        columns[split] = table(suite, Models(suite))
    lines = [
        "# What can be seen of the task without training",
        "",
        f"`python -m benchmarks.routing_limits`, {suite.label}, per cent of the images whose task is found (chance 12.5); a router",
        "that loses 2 points of accuracy against the oracle has to find about 92.",
        "",
        "| signal | validation | test |",
        "|---|--:|--:|",
    ]
    for label, value in columns["validation"].items():
        lines.append(f"| {label} | {value:.1f} | {columns['test'][label]:.1f} |")
    print("\n".join(lines))
    (arguments.out / "routing_limits.md").write_text("\n".join(lines) + "\n")
    write_json(arguments.out / "routing_limits.json", {"machine": machine(), **columns})


if __name__ == "__main__":
    main()
