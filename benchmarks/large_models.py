"""Plans for pools of 8 and 70 billion parameters without their weights, and what a merge of a tenth of the size measures.

    python -m benchmarks.large_models            # plans: seconds; docs/large_models.md and .json
    python -m benchmarks.large_models --measure  # and loading and generating; makes 11 GB of checkpoints on first use

Plans need shapes alone, so the pools are safetensors headers over files that take no room (sparse). What is measured runs the
same way through the code: 1.1 B parameters, four experts, bfloat16, read and written tensor by tensor; its merge under a
limit of memory is that of :mod:`benchmarks.memory`.
"""

import argparse
import contextlib
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from fusion_bench.modelpool import CausalLMPool
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.checkpoints import pool_of
from benchmarks.suites import NOTES, in_words, machine, write_json
from fusion_bench_didi import DiDiMerging, DiDiModel
from fusion_bench_didi.programs.measure import peak_resident

DOCS = Path("docs")
SHARD = 5 * 10**9
BUDGET = 2.0
_LLAMA_31 = dict(
    vocab_size=128256,
    num_key_value_heads=8,
    rope_theta=500000.0,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
#: The shapes of Llama 3.1, from its configurations.
SHAPES = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}  # fmt: skip
PLANS = (("8B", 8), ("70B", 4))
MEASURED, EXPERTS = "llama-1b", 4


def hollow(place: Path, shape: Mapping[str, int], names: list[str]) -> dict[str, str]:
    """Checkpoints of headers: sharded bfloat16 files whose bytes were never written.

    Returns:
        directories by model name.
    """
    config = LlamaConfig(**{**_LLAMA_31, **shape}, torch_dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, weight in model.named_parameters():
        if filled + 2 * weight.numel() > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = weight.shape
        filled += 2 * weight.numel()
    for name in names:
        directory = place / name
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(directory)
        files = {}
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            _headers(directory / file, shard)
            files |= dict.fromkeys(shard, file)
        index = {"metadata": {}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return {name: str(place / name) for name in names}


def _headers(file: Path, shapes: Mapping[str, torch.Size]) -> None:
    """A safetensors file that ends where it should, with nothing in it."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + end)


def pool(directories: Mapping[str, str]) -> CausalLMPool:
    kwargs = DictConfig({"torch_dtype": "bfloat16"})
    return CausalLMPool(dict(directories), tokenizer=None, model_kwargs=kwargs)


def plan(shape: str, tasks: int) -> dict:
    """The dry run of a hollow pool: what it tells, and what telling takes."""
    with tempfile.TemporaryDirectory() as scratch:
        names = ["_pretrained_", *(f"task{t}" for t in range(tasks))]
        directories = hollow(Path(scratch), SHAPES[shape], names)
        files = [f for d in directories.values() for f in Path(d).glob("*.safetensors")]
        found = {"read_gb": sum(f.stat().st_size for f in files) / 1e9}
        for where, place in (("memory", None), ("directory", f"{scratch}/merged")):
            begin, printed = time.perf_counter(), io.StringIO()
            with contextlib.redirect_stdout(printed):
                method = DiDiMerging(budget=BUDGET, dry_run=True, output_dir=place)
                method.run(pool(directories))
            found[f"peak_in_{where}"] = PEAK.search(printed.getvalue())[1]
        facts = FACTS.search(printed.getvalue()).groupdict()
        return {**found, **facts, "seconds": time.perf_counter() - begin}


#: What a plan says.
FACTS = re.compile(
    r"(?P<matrices>\d+) matrices.*model is (?P<model>[\d.]+ \w+);.* leaves (?P<modules>[\d.]+ \w+)",
    re.DOTALL,
)
PEAK = re.compile(r"predicted peak memory: ([\d.]+ \w+)")


def merge_to_directory(place: Path, experts: int) -> dict:
    """The measured pool merged into a directory, in this process."""
    directories = pool_of(MEASURED, experts)
    given = sum(f.stat().st_size for d in directories.values() for f in Path(d).glob("*.safetensors"))  # fmt: skip
    begin = time.process_time()
    DiDiMerging(budget=BUDGET, output_dir=str(place)).run(pool(directories))
    found = {
        "cpu_seconds": time.process_time() - begin,
        "peak_gb": peak_resident() / 2**30,
    }
    stored = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
    return {**found, "given_gb": given / 1e9, "stored_gb": stored / 1e9}


def load_and_generate(place: Path, experts: int, tokens: int = 16) -> dict:
    """The stored model in the type that it has, and its answer as a task; in this process."""
    begin = time.process_time()
    model = DiDiModel.from_pretrained(place)
    loading = time.process_time() - begin
    model.set_task(model.tasks[0])
    ids, begin = torch.arange(1, 17)[None], time.process_time()
    with torch.inference_mode():
        answer = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip
    assert answer.shape == (1, 16 + tokens)
    return {
        "load_cpu_seconds": loading,
        "dtype": str(next(model.parameters()).dtype),
        "token_cpu_seconds": (time.process_time() - begin) / tokens,
        "loaded_gb": peak_resident() / 2**30,
    }


STEPS = {"merge": merge_to_directory, "load": load_and_generate}


def measured(experts: int) -> dict:
    """Both steps, each in a process of its own, so that the peak is that of the step."""
    pool_of(MEASURED, experts)
    found: dict = {"experts": experts}
    with tempfile.TemporaryDirectory() as scratch:
        for step in STEPS:
            line = [sys.executable, "-m", "benchmarks.large_models", "--step", step]
            line += ["--experts", str(experts)]
            done = subprocess.run([*line, "--at", f"{scratch}/merged"], capture_output=True, text=True)  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{step} failed:\n{done.stderr[-3000:]}")
            found |= json.loads(done.stdout.strip().splitlines()[-1])
            print(step, found, flush=True)
    return found


def page(record: Mapping, limited: Mapping) -> str:
    """What was found, as a page.

    Args:
        limited: what :mod:`benchmarks.memory` found.
    """
    rows = [
        f"| {shape} x {tasks} | {p['matrices']} | {p['model']} | {p['read_gb']:.0f} GB | {p['modules']} | {p['peak_in_memory']} "
        f"| {p['peak_in_directory']} | {p['seconds']:.1f} |"
        for (shape, tasks), p in zip(PLANS, record["plans"])
    ]
    per_gb = limited["seconds"] / limited["files_gb"]
    minutes = [f"{per_gb * p['read_gb'] / 60:.0f}" for p in record["plans"]]
    return (
        (NOTES / "large_models.md")
        .read_text()
        .format(
            plans="\n".join(rows),
            machine=in_words(record["machine"]),
            budget=record["budget"],
            files=f"{limited['files_gb']:.1f}",
            limit=f"{limited['limit_gb']:.0f}",
            seconds=f"{limited['seconds']:.0f}",
            per_gb=f"{per_gb:.1f}",
            minutes=minutes,
            measured="\n".join(_measured(record.get("measured"))),
        )
    )


def _measured(found: Mapping | None) -> list[str]:
    """What the stored model takes to load and to generate with, if that was measured."""
    if found is None:
        return ["`python -m benchmarks.large_models --measure` adds what loading and generating take."]  # fmt: skip
    named = {
        "cpu_seconds": "merging, CPU seconds",
        "peak_gb": "peak of merging, GB",
        "stored_gb": "directory written, GB",
        "load_cpu_seconds": f"loading it in {found['dtype']}, CPU seconds",
        "loaded_gb": "peak of loading and generating, GB",
        "token_cpu_seconds": "CPU seconds per generated token, as a task",
    }
    lines = [f"| {found['experts']} experts, {found['given_gb']:.1f} GB | |", "|---|--:|"]  # fmt: skip
    return lines + [f"| {name} | {found[key]:.2f} |" for key, name in named.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="merge, load and generate too")  # fmt: skip
    parser.add_argument("--experts", type=int, default=EXPERTS, help="of the measured pool")  # fmt: skip
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments.at, arguments.experts)))
        return
    file = DOCS / "large_models.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    if not arguments.page:
        plans = [plan(*which) for which in PLANS]
        record |= {"machine": machine(), "budget": BUDGET, "plans": plans}
        if arguments.measure:
            record["measured"] = measured(arguments.experts)
        write_json(file, record)
    limited = json.loads((DOCS / "memory.json").read_text())
    file.with_suffix(".md").write_text(page(record, limited))


if __name__ == "__main__":
    main()
