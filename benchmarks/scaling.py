"""How a merge grows: over processes of one thread each, and over numbers of tasks.

    python -m benchmarks.scaling                  # docs/scaling.md and .json
    python -m benchmarks.scaling processes        # one part; the other stays as it was
    python -m benchmarks.scaling processes --only vit-l-14 --sizes 1 2
    python -m benchmarks.scaling tasks --counts 100 1000

Seconds are of the processor, so that other work on the machine does not count; of several processes those of the slowest. With
more processes than the machine has cores they show how work is spread, not how long one waits for it. Beside every merge stands what
as many processes did per second right before and after it (``benchmarks.cost_rates``), which ``benchmarks.cost_model`` holds it against.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool, CLIPVisionModelPool
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

from benchmarks.checkpoints import pool_of
from benchmarks.cost_rates import beside, mean_of
from benchmarks.processes import Job, silence
from benchmarks.resident import peaks
from benchmarks.scaling_page import page
from benchmarks.suites import machine, write_json
from fusion_bench_didi.files import file_digest
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel


@dataclass(frozen=True)
class Case:
    """One merge over processes.

    Args:
        shape: an architecture of ``benchmarks.checkpoints``, or ``adapters``.
    """

    shape: str
    tasks: int
    budget: float

    def pool(self, home: Path) -> Callable[[], BaseModelPool]:
        """What makes the pool, of files that lie there or are made in ``home``."""
        if self.shape == "adapters":
            pool = adapter_pool(self.tasks, home)
            return lambda: pool
        models = pool_of(self.shape, self.tasks)
        if self.shape.startswith("llama"):
            kwargs = {"torch_dtype": "bfloat16"}  # float32 if not told
            return lambda: CausalLMPool(
                dict(models), tokenizer=None, model_kwargs=DictConfig(kwargs)
            )
        return lambda: CLIPVisionModelPool(dict(models))

    @property
    def files(self) -> Path | None:
        """The base model's directory, for the rate of reading; None where models are small."""
        if self.shape == "adapters":
            return None
        return Path(pool_of(self.shape, self.tasks)["_pretrained_"])


CASES = (
    Case("vit-b-32", 8, 1.4),
    Case("vit-b-32", 8, 0.5),
    Case("vit-l-14", 8, 1.4),
    Case("vit-l-14", 8, 0.5),
    Case("llama-1b", 4, 1.4),
    Case("adapters", 200, 0.3),
)
PROCESSES = (1, 2, 4)
COUNTS = (100, 300, 1000)
#: Loads that are tried, of which the least counts: they take less than what else a process does.
LOADS = 3


def measured(function: Callable[[], Any]) -> Callable[[int], dict[str, float]]:
    """The function on a process that prints nothing, and what it took there, without what measuring took."""

    def run(_: int) -> dict[str, float]:
        silence()
        gc.collect()  # of all that libraries hold, which else comes amid some merges and not others
        begun, cpu = time.perf_counter(), time.process_time()
        with peaks() as most:
            function()
        looking = most.pop("looking")
        return {
            "wall": time.perf_counter() - begun,
            "cpu": time.process_time() - cpu - looking,
            **most,
        }

    return run


def processes(
    cases: Sequence[Case], sizes: Sequence[int], before: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each case on each number of processes.

    Args:
        before: rows of other cases and sizes, which stay.
    """
    anew = [(c.shape, c.tasks, c.budget, n) for c in cases for n in sizes]
    keys = ("shape", "tasks", "budget", "processes")
    rows = [row for row in before if tuple(row[k] for k in keys) not in anew]
    for case in cases:
        goal = None
        with tempfile.TemporaryDirectory() as home:
            pool, target = case.pool(Path(home)), Path(home) / "merged"

            def merge() -> None:
                DiDiMerging(budget=case.budget, output_dir=str(target)).run(pool())

            for size in sizes:
                earlier = beside(size, files=case.files)
                found = Job(size, measured(merge)).results(seconds=3600)
                rates = mean_of([earlier, beside(size, files=case.files)])
                if not all(isinstance(row, dict) for row in found):
                    raise RuntimeError(f"{case} on {size}: {found}")
                files = sorted(target.glob("*.safetensors"))
                digests = [file_digest(file) for file in files]
                shutil.rmtree(target)
                goal = goal or digests
                rows.append(
                    {
                        "shape": case.shape,
                        "tasks": case.tasks,
                        "budget": case.budget,
                        "processes": size,
                        "wall": max(row["wall"] for row in found),
                        **{
                            key: [row[key] for row in found]
                            for key in ("cpu", "own", "files", "resident")
                        },
                        "same bytes": digests == goal,
                        "rates": asdict(rates),
                    }
                )
                _show(rows[-1])
    order = [case.shape for case in CASES]
    return sorted(rows, key=lambda row: order.index(row["shape"]))


def _show(row: dict[str, Any]) -> None:
    print({key: value for key, value in row.items() if key != "rates"}, flush=True)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 32)
    )


def small_pool(count: int) -> BaseModelPool:
    """One small model fine-tuned on so many tasks, mostly of low rank."""
    models: dict[str, nn.Module] = {"_pretrained_": small()}
    for t in range(count):
        draw = torch.Generator().manual_seed(t)
        model = models[f"task{t:04d}"] = small()
        with torch.no_grad():
            for value in model.parameters():
                change = torch.randn(value.shape, generator=draw)
                if value.ndim == 2:
                    left, right = change[:, :3], change[:3]
                    change = left @ right
                value += 0.03 * change
    return BaseModelPool(models)


def adapter_pool(count: int, home: Path) -> CausalLMPool:
    """LoRA adapters of rank 8 of one small language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(home / "base")
    targets = ["q_proj", "v_proj", "up_proj"]
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(home / "base"),
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    }
    entries = {}
    for t in range(count):
        draw, tensors = torch.Generator().manual_seed(t), {}
        for name, module in base.named_modules():
            if name.rpartition(".")[2] in targets:
                key = f"base_model.model.{name}.lora"
                m, n = module.weight.shape
                tensors[f"{key}_A.weight"] = torch.randn(8, n, generator=draw) / n**0.5
                tensors[f"{key}_B.weight"] = 0.02 * torch.randn(m, 8, generator=draw)
        place = home / f"task{t:04d}"
        place.mkdir()
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(told))
        entries[place.name] = str(place)
    models = {"_pretrained_": str(home / "base"), **entries}
    return CausalLMPool(models, tokenizer=None)


def tasks(counts: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Merging to files, and loading them, over numbers of tasks; adapters over a fifth of these."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, numbers, budget in (
        ("small models", counts, 1.4),
        ("small models", counts, 0.2),
        ("adapters", [max(count // 5, 2) for count in counts], 0.3),
    ):
        rows = found[f"{kind}, budget {budget}"] = []
        for count in numbers:
            with tempfile.TemporaryDirectory() as home:
                place, target = Path(home), Path(home) / "merged"
                adapters = kind == "adapters"
                pool = adapter_pool(count, place) if adapters else small_pool(count)

                def merge() -> None:
                    DiDiMerging(budget=budget, output_dir=str(target)).run(pool)

                def load() -> None:
                    base = pool.load_model("_pretrained_")
                    DiDiModel.from_pretrained(target, base)

                row: dict[str, Any] = {"tasks": count}
                before = beside(1)
                for what, function, times in (("merge", merge, 1), ("load", load, LOADS)):  # fmt: skip
                    tried = []
                    for _ in range(times):
                        tried += Job(1, measured(function)).results(seconds=3600)
                        if not isinstance(tried[-1], dict):
                            raise RuntimeError(f"{kind}, {count}: {tried[-1]}")
                    took = min(tried, key=lambda one: one["cpu"])
                    row |= {f"{what} {key}": value for key, value in took.items()}
                row["rates"] = asdict(mean_of([before, beside(1)]))
            rows.append(row)
            _show({"what": kind, **row})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("processes", "tasks"))
    shapes = list(dict.fromkeys(case.shape for case in CASES))
    parser.add_argument("--only", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(PROCESSES))
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    if 1 not in arguments.sizes:
        parser.error("--sizes without 1: the others are held against it")
    torch.set_num_threads(1)
    if sys.platform != "linux":
        parser.error("peaks of memory are read from /proc, which Linux has")
    file = arguments.out / "scaling.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found["machine"] = machine()
    if arguments.what != "tasks":
        cases = [case for case in CASES if case.shape in arguments.only]
        before = found.get("processes", ())
        found["processes"] = processes(cases, arguments.sizes, before)
    if arguments.what != "processes":
        found["tasks"] = tasks(arguments.counts)
    write_json(file, found)
    (arguments.out / "scaling.md").write_text("\n".join(page(found)) + "\n")


if __name__ == "__main__":
    main()
