"""One language model, three modalities: merges of experts whose encoders are their own, as a table.

    python -m benchmarks.multimodal_suite          # trains (kept), merges, docs/multimodal.md and .json; some minutes
    python -m benchmarks.multimodal_suite --page   # the page anew

Encoders and projectors are kept whole per task by ``own``; static methods merge the language models and leave every task
its encoder and projector, which are counted too.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from fusion_bench.method import (
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TaskSingularVectorMerging,
    TiesMergingAlgorithm,
)
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.multimodal import (
    MODALITIES,
    MultimodalModel,
    draw,
    sentences,
    size_of,
    words_right,
)
from benchmarks.suites import NOTES, in_words, machine, write_json
from fusion_bench_didi import DiDiMerging, DiDiModel
from fusion_bench_didi.method import EMRMerging, TSVCompression

DOCS, MODELS = Path("docs"), Path("outputs/multimodal")
BASE = "_pretrained_"
OWN = ("encoders.*", "projectors.*")
TEXT_STEPS, STEPS, BATCH, HELD_OUT = 150, 300, 32, 400
BUDGETS = (0.1, 0.25, 0.5, 1.0)


def _seed(*values: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(v * 1009**i for i, v in enumerate(values)))


def _trained(model: nn.Module, batch: Callable, steps: int, rate: float) -> nn.Module:
    """By AdamW on what ``batch(step)`` gives: logits and what they should name."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        logits, ids = batch(step)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    print(f"loss {loss.item():.3f} after {steps} steps", flush=True)
    return model.eval()


def base_model() -> MultimodalModel:
    """A language model of all sentences, before it sees anything."""
    torch.manual_seed(0)
    model = MultimodalModel()

    def batch(step: int):
        modality = [*MODALITIES][step % len(MODALITIES)]
        _, picks = draw(modality, BATCH, _seed(step, 1))
        ids = sentences(modality, picks)
        return model.language_model(input_ids=ids).logits, ids

    return _trained(model, batch, TEXT_STEPS, 2e-3)


def expert(base: MultimodalModel, modality: str) -> MultimodalModel:
    """The base model told what there is to see: first encoder and projector, then the language model with them."""
    model = copy.deepcopy(base).train()
    torch.manual_seed(1 + [*MODALITIES].index(modality))
    for part in (model.encoders, model.projectors):
        for name, module in part.items():
            module.requires_grad_(name == modality)

    def batch(step: int):
        inputs, picks = draw(modality, BATCH, _seed(step, 2))
        ids = sentences(modality, picks)
        return model(ids, modality, inputs), ids

    return _trained(model, batch, STEPS, 1e-3).requires_grad_(True)


def suite(place: Path) -> dict[str, MultimodalModel]:
    """Base model and experts, trained where they are missing."""
    models: dict[str, MultimodalModel] = {}
    for name in (BASE, *MODALITIES):
        file = place / f"{name}.safetensors"
        if not file.is_file():
            print(f"training {name}", flush=True)
            made = expert(models[BASE], name) if models else base_model()
            place.mkdir(parents=True, exist_ok=True)
            kept = {n: t.contiguous().clone() for n, t in made.state_dict().items()}
            save_file(kept, file)
        models[name] = MultimodalModel().eval()
        models[name].load_state_dict(load_file(file))
    return models


@torch.inference_mode()
def score(model: nn.Module, modality: str) -> float:
    """Share of the attributes named rightly, by generation, on held-out inputs."""
    inputs, picks = draw(modality, HELD_OUT, _seed(10**6, 3))
    return words_right(model.generate(modality, inputs), picks, modality)


# --- rows ----------------------------------------------------------------------------


def with_own(language_model: nn.Module, model: MultimodalModel) -> MultimodalModel:
    """An expert's encoders and projectors before another language model."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "language_model": language_model}
    return twin


def static(make: Callable) -> Callable:
    """A merge of the language models alone; returns the model of each task, and what is stored beyond the base model's."""

    def run(models: dict[str, MultimodalModel]):
        parts = {n: copy.deepcopy(m.language_model) for n, m in models.items()}
        merged = make().run(BaseModelPool(parts)).eval()
        own = sum(own_bytes(models[m], m) for m in MODALITIES)
        size = sum(t.nbytes for t in merged.state_dict().values())
        return (lambda task: with_own(merged, models[task])), size + own

    return run


def dynamic(make: Callable) -> Callable:
    """A merge of everything, encoders kept, through a directory: what is evaluated is what was saved and loaded again."""

    def run(models: dict[str, MultimodalModel]):
        merged = make().run(BaseModelPool(dict(models)))
        with tempfile.TemporaryDirectory() as place:
            merged.save_pretrained(Path(place) / "merged")
            again = type(merged).from_pretrained(Path(place) / "merged", copy.deepcopy(models[BASE]))  # fmt: skip
        assert again.storage == merged.storage
        check_own(again, models)

        def model(task: str) -> nn.Module:
            again.set_task(task)
            return again.eval()

        return model, again.storage.excl_bits // 8

    return run


def check_own(merged: DiDiModel, models: dict[str, MultimodalModel]) -> None:
    """Every task has its encoder and projector to the bit."""
    for task in MODALITIES:
        found, wanted = merged.materialize(task).state_dict(), models[task].state_dict()
        for name, value in wanted.items():
            if name.startswith(tuple(p[:-1] for p in OWN)):
                assert found[name].equal(value), (task, name)


def own_bytes(model: MultimodalModel, modality: str) -> int:
    """Of an expert's encoder and projector."""
    return size_of(model.state_dict(), f"encoders.{modality}.", f"projectors.{modality}.")  # fmt: skip


STATIC = {
    "Averaging": static(lambda: SimpleAverageAlgorithm(show_pbar=False)),
    "Task Arithmetic": static(lambda: TaskArithmeticAlgorithm(scaling_factor=0.4)),
    "TIES": static(
        lambda: TiesMergingAlgorithm(
            scaling_factor=0.4, threshold=20, remove_keys=[], merge_func="sum"
        )
    ),
    "TSV-M": static(lambda: TaskSingularVectorMerging(alpha=1.0)),
}
DYNAMIC = {
    "EMR": dynamic(lambda: EMRMerging(own=OWN)),
    "TSV-C": dynamic(lambda: TSVCompression(own=OWN)),
}


def didi(models: dict[str, MultimodalModel], budget: float) -> Callable:
    """DiDi with a budget in units of one language model, to which encoders and projectors come."""
    unit = sum(t.nbytes for t in models[BASE].parameters())
    own = sum(own_bytes(models[m], m) for m in MODALITIES)
    shared = budget * language_bytes(models[BASE])
    return dynamic(lambda: DiDiMerging(budget=(own + shared) / unit, own=OWN))


def language_bytes(model: MultimodalModel) -> int:
    return sum(t.nbytes for t in model.language_model.parameters())


def run(models: dict[str, MultimodalModel]) -> dict:
    """Every row: accuracy by modality, and bytes beyond the base model."""
    base, own = models[BASE], sum(own_bytes(models[m], m) for m in MODALITIES)
    whole = 3 * language_bytes(base) + own
    parts = base.language_model
    references = {
        "Base language model": ((lambda t: with_own(parts, models[t])), own),
        "Individuals": (models.__getitem__, whole),
    }
    merges = STATIC | DYNAMIC | {f"DiDi {b}": didi(models, b) for b in BUDGETS}
    rows: dict[str, dict] = {}
    for name in (*references, *merges):
        begin = time.perf_counter()
        model, size = references.get(name) or merges[name](models)
        seconds = time.perf_counter() - begin
        right = {m: score(model(m), m) for m in MODALITIES}
        rows[name] = {"right": right, "bytes": size, "seconds": seconds}
        print(name, rows[name], flush=True)
    return {
        "machine": machine(),
        "language_bytes": language_bytes(base),
        "own_bytes": {m: own_bytes(models[m], m) for m in MODALITIES},
        "rows": rows,
    }


def page(record: dict) -> str:
    """The table and what it says."""
    unit, own = record["language_bytes"], sum(record["own_bytes"].values())
    best = record["rows"]["Individuals"]["right"]
    lines = [
        f"| method | {' | '.join(MODALITIES)} | average | retention | x language model | encoders and projectors | seconds |",
        "|---|" + "--:|" * (len(MODALITIES) + 5),
    ]
    average, size = {}, {}
    for name, row in record["rows"].items():
        right = row["right"]
        average[name] = f"{100 * sum(right.values()) / len(right):.1f}"
        size[name] = f"{(row['bytes'] - own) / unit:.2f}"
        kept = 100 * sum(right[m] / best[m] for m in right) / len(right)
        cells = [f"{100 * value:.1f}" for value in right.values()]
        cells += [average[name], f"{kept:.1f}", size[name], f"{own / unit:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['seconds']:.1f} |")
    return (
        (NOTES / "multimodal.md")
        .read_text()
        .format(
            table="\n".join(lines),
            machine=in_words(record["machine"]),
            average=average,
            x=size,
            megabytes=f"{unit / 1e6:.1f}",
            own=f"{own / unit:.2f}",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="where they are kept")  # fmt: skip
    parser.add_argument("--page", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    file = DOCS / "multimodal.json"
    if not arguments.page:
        write_json(file, run(suite(arguments.models)))
    (DOCS / "multimodal.md").write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
