"""How a merge grows: over processes of one thread each, and over numbers of tasks.

    python -m benchmarks.scaling                  # docs/scaling.md and .json
    python -m benchmarks.scaling processes        # one part; the other stays as it was
    python -m benchmarks.scaling tasks --counts 100 1000

Seconds are of the processor, so that other work on the machine does not count; of several processes those of the slowest. Memory is
the most that one process had resident.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fusion_bench.modelpool import BaseModelPool, CausalLMPool, CLIPVisionModelPool
from safetensors.torch import save_file
from torch import nn

from benchmarks.checkpoints import pool_of
from benchmarks.processes import Job, silence
from benchmarks.suites import in_words, machine, write_json
from fusion_bench_didi.checkpoint.tensors import file_digest
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel
from fusion_bench_didi.programs.measure import peak_resident

#: Merges over processes: architecture, tasks, budget.
CASES = (("vit-b-32", 8, 1.4), ("vit-b-32", 8, 0.5))
PROCESSES = (1, 2)
COUNTS = (100, 300, 1000)
#: Loads that are tried, of which the least counts: they take less than what else a process does.
LOADS = 3


def measured(function: Callable[[], Any]) -> Callable[[int], dict[str, float]]:
    """The function on a process that prints nothing, and what it took there."""

    def run(_: int) -> dict[str, float]:
        silence()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of what was before
        begun, cpu = time.perf_counter(), time.process_time()
        function()
        return {
            "wall": time.perf_counter() - begun,
            "cpu": time.process_time() - cpu,
            "peak": peak_resident(),
        }

    return run


def processes() -> list[dict[str, Any]]:
    rows = []
    for shape, tasks, budget in CASES:
        models = pool_of(shape, tasks)
        language = shape.startswith("llama")
        goal = None
        for size in PROCESSES:
            with tempfile.TemporaryDirectory() as home:
                target = Path(home) / "merged"

                def merge() -> None:
                    pool = (
                        CausalLMPool(dict(models), tokenizer=None)
                        if language
                        else CLIPVisionModelPool(dict(models))
                    )
                    DiDiMerging(budget=budget, output_dir=str(target)).run(pool)

                found = Job(size, measured(merge)).results(seconds=3600)
                if not all(isinstance(row, dict) for row in found):
                    raise RuntimeError(f"{shape} on {size}: {found}")
                files = sorted(target.glob("*.safetensors"))
                digests = [file_digest(file) for file in files]
            goal = goal or digests
            rows.append(
                {
                    "shape": shape,
                    "tasks": tasks,
                    "budget": budget,
                    "processes": size,
                    "wall": max(row["wall"] for row in found),
                    "cpu": [row["cpu"] for row in found],
                    "peak": [row["peak"] for row in found],
                    "same bytes": digests == goal,
                }
            )
            print(rows[-1], flush=True)
    return rows


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
                for what, function, times in (("merge", merge, 1), ("load", load, LOADS)):  # fmt: skip
                    tried = []
                    for _ in range(times):
                        tried += Job(1, measured(function)).results(seconds=3600)
                        if not isinstance(tried[-1], dict):
                            raise RuntimeError(f"{kind}, {count}: {tried[-1]}")
                    took = min(tried, key=lambda one: one["cpu"])
                    row |= {f"{what} {key}": value for key, value in took.items()}
            rows.append(row)
            print(kind, row, flush=True)
    return found


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """Of the growth from the first to the last row."""
    first, last = rows[0], rows[-1]
    return math.log(last[key] / first[key]) / math.log(last["tasks"] / first["tasks"])


def page(found: dict[str, Any]) -> list[str]:
    lines = [
        "# Growth over processes and tasks",
        "",
        f"`python -m benchmarks.scaling`; {in_words(found['machine'])}. Seconds of the processor, on a machine that does other work "
        "too:",
        "they repeat within some tens of per cent.",
    ]
    if rows := found.get("processes"):
        lines += [
            "",
            "## Processes",
            "",
            "One thread each, files in the system's cache to a written model. *Speed-up*: the seconds of one process over those of "
            "the",
            "slowest of several. Memory holds the base model, which every process loads, and pages of files that are mapped.",
            "",
            "| model | tasks | budget | processes | seconds of each | speed-up | peak GB of each | same bytes |",
            "|---|--:|--:|--:|---|--:|---|---|",
        ]
        for row in rows:
            one = next(
                r
                for r in rows
                if r["processes"] == 1
                and (r["shape"], r["budget"]) == (row["shape"], row["budget"])
            )
            lines.append(
                f"| {row['shape']} | {row['tasks']} | {row['budget']} | {row['processes']} | "
                f"{', '.join(f'{s:.1f}' for s in row['cpu'])} | {one['cpu'][0] / max(row['cpu']):.2f} | "
                f"{', '.join(f'{p / 1e9:.2f}' for p in row['peak'])} | {'yes' if row['same bytes'] else 'no'} |"
            )
    if groups := found.get("tasks"):
        lines += [
            "",
            "## Tasks",
            "",
            "A model of four small matrices and vectors, and LoRA adapters of rank 8 of a language model of width 128: merged into "
            "files,",
            "and these loaded (the least of three). *Exponent*: of the seconds in the number of tasks, from the first row to the last.",
            "",
            "| what | tasks | merge s | load s | merge peak GB |",
            "|---|--:|--:|--:|--:|",
        ]
        for what, rows in groups.items():
            for row in rows:
                lines.append(
                    f"| {what} | {row['tasks']} | {row['merge cpu']:.2f} | {row['load cpu']:.2f} | {row['merge peak'] / 1e9:.2f} |"
                )
            found_exponents = [exponent(rows, f"{w} cpu") for w in ("merge", "load")]
            lines.append(
                f"| {what}, exponent | | {found_exponents[0]:.2f} | {found_exponents[1]:.2f} | |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("processes", "tasks"))
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if sys.platform != "linux":
        parser.error("peaks of memory are read from /proc, which Linux has")
    file = arguments.out / "scaling.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found["machine"] = machine()
    if arguments.what != "tasks":
        found["processes"] = processes()
    if arguments.what != "processes":
        found["tasks"] = tasks(arguments.counts)
    write_json(file, found)
    (arguments.out / "scaling.md").write_text("\n".join(page(found)) + "\n")


if __name__ == "__main__":
    main()
