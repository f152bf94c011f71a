"""Mixed batches out of what is stored: memory and time within a limit, beside holding everything and beside a model per task.

    python -m benchmarks.slim_serving                              # ViT-B/32 and the shapes of SmolLM2-135M at 0.25
    python -m benchmarks.slim_serving --on vit-b-32 --drawn --device cuda     # no merge: a minute

Eight tasks are merged for real, or drawn with ``--drawn``: experts of random codes in the forms and sizes of such a merge.
A batch is timed in turns with the plain model; on a CPU processor time is counted, as other work may run on the machine.
Adds to benchmarks/results/slim_serving.json and writes docs/slim_serving.md.
"""

import argparse
import contextlib
import gc
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool
from torch import Tensor, nn

from benchmarks.checkpoints import SHAPES, pool_of, root
from benchmarks.clock import Clock
from benchmarks.slim_page import write_page
from benchmarks.suites import machine, write_json
from fusion_bench_didi.deltas.base import Delta
from fusion_bench_didi.deltas.coded import CodedLowRankDelta
from fusion_bench_didi.deltas.quantized import RoundedLowRankDelta
from fusion_bench_didi.method.didi import DiDiMerging
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.programs.measure import (
    forget_peak,
    free_memory,
    peak_resident,
)
from fusion_bench_didi.quantization.coded_matrix import CodedMatrix
from fusion_bench_didi.quantization.codes import pack_codes
from fusion_bench_didi.quantization.dead_zone import quantize
from fusion_bench_didi.serving.banks import Serving

RESULTS = Path(__file__).resolve().parent / "results" / "slim_serving.json"
#: Tokens of a prompt, prompts and steps of decoding.
PROMPT, PROMPTS, STEPS = 16, 8, 4
#: Turns of the clock; one where a plain forward takes more than so many seconds.
TURNS, LONG = 3, 1.0
#: Bits of a coded number when experts are drawn.
CODED_BITS = 2.0


def merged(what: str, factors: str, budget: float, tasks: int) -> DynamicModel:
    """The merged model, made where it is missing."""
    place = root() / "merged" / f"{what}-{budget:g}-{factors}-{tasks}"
    if not place.is_dir():
        kind = CLIPVisionModelPool if what.startswith("vit") else CausalLMPool
        extra = {} if kind is CLIPVisionModelPool else {"tokenizer": None}
        pool = kind(pool_of(what, tasks), **extra)
        with contextlib.redirect_stdout(io.StringIO()):
            model = DiDiMerging(budget=budget, factor_dtype=factors).run(pool)
        model.save_pretrained(place)
    return DiDiModel.from_pretrained(place)


def drawn(what: str, factors: str, budget: float, tasks: int) -> DynamicModel:
    """Experts of random codes on a random base model: the same rank everywhere relative to what it costs."""
    torch.manual_seed(0)
    shape = SHAPES[what]
    model = shape.build().to(shape.dtype).eval()
    unit = sum(8 * p.nbytes for p in model.parameters())
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim > 1 and min(p.shape) > 64 and name not in shape.frozen
    }
    numel = sum(p.numel() for p in matrices.values())
    width = CODED_BITS if factors == "auto" else 4
    made: dict[tuple, Delta] = {}
    experts: dict[str, dict[str, Delta]] = {f"task{t:02d}": {} for t in range(tasks)}
    for name, p in matrices.items():
        m, n = p.shape[0], p[0].numel()
        rank = max(int(budget * unit / tasks * p.numel() / numel / (m + n) / width), 1)
        key = tuple(p.shape)
        if key not in made:
            made[key] = _product(key, m, n, min(rank, m, n), factors == "auto")
        for deltas in experts.values():
            parts = {part: t.clone() for part, t in made[key].tensors().items()}
            deltas[name] = type(made[key])(key, **parts, **made[key].options())
    return DynamicModel(model, {}, experts, unit_bits=unit)


def _product(shape: tuple, m: int, n: int, rank: int, coded: bool) -> Delta:
    if coded:
        sides = [quantize(torch.randn(rank, side), 1.0) for side in sorted((m, n))]
        return CodedLowRankDelta.of(shape, CodedMatrix(tuple(sides), 1e-4, 0.0))
    codes = [
        torch.randint(-8, 8, sides, dtype=torch.int8)
        for sides in ((m, rank), (rank, n))
    ]
    packed = [pack_codes(code, 4) for code in codes]
    return RoundedLowRankDelta(shape, *packed, torch.full((rank,), 1e-5), 4)


class Memory:
    """Bytes of tensors that are alive, and of the most that was in use meanwhile, on one device."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def alive(self) -> int:
        free_memory()
        kinds = (Tensor, nn.Parameter)
        tensors = [o for o in gc.get_objects() if type(o) in kinds]
        storages = (
            t.untyped_storage() for t in tensors if t.device.type == self.device.type
        )
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def peak(self, call: Callable[[], object]) -> int:
        """Above what was in use before the call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        free_memory()
        forget_peak()
        before = psutil.Process().memory_info().rss
        call()
        return peak_resident() - before


class Case:
    """One merged model and its batches.

    Args:
        model: on its device.
        batch: samples of a forward.
    """

    def __init__(self, model: DynamicModel, batch: int, device: str):
        self.model, self.memory, self.clock = model, Memory(device), Clock(device)
        self.language = hasattr(model.backbone.config, "vocab_size")
        generator = torch.Generator().manual_seed(0)
        count, config = len(model.tasks), model.backbone.config
        self.ids = torch.randint(count, (batch,), generator=generator).to(device)
        if self.language:
            shape = batch, PROMPT
            inputs = torch.randint(config.vocab_size, shape, generator=generator)
        else:
            side = config.image_size
            inputs = torch.randn(batch, 3, side, side, generator=generator)
            inputs = inputs.to(next(model.backbone.parameters()).dtype)
        self.inputs = inputs.to(device)
        backbone = sum(p.nbytes for p in model.backbone.parameters())
        stored = sum(
            d.bits for e in model.modulators.values() for d in e.deltas.values()
        )
        stored += sum(d.bits for d in model.shared.values())
        self.backbone, self.stored = backbone, stored // 8

    @torch.inference_mode()
    def forward(self, model: Callable, inputs: Tensor, **tasks) -> object:
        more = {"logits_to_keep": 1} if self.language else {}
        return model(inputs, **more, **tasks)

    @torch.inference_mode()
    def generate(self, model, steps: int, **tasks) -> Tensor:
        inputs = self.inputs[:PROMPTS]
        mask = torch.ones_like(inputs)
        return model.generate(
            inputs,
            attention_mask=mask,
            min_new_tokens=steps,
            max_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
            **tasks,
        )

    def each_alone(self, models: list[nn.Module]) -> None:
        for task, model in enumerate(models):
            here = self.ids == task
            if here.any():
                self.forward(model, self.inputs[here])

    def row(
        self, way: Callable[[], object], generating: Callable | None = None
    ) -> dict:
        """Memory and time of a way to run the batch, in turns with the plain model."""
        clock, peaks, pairs, steps = self.clock, [], [], []
        found = {"first_peak": self.memory.peak(way)}  # where layers are checked
        while not pairs or (len(pairs) < TURNS and pairs[0][0] < LONG):
            before = clock(self.plain)
            peaks.append(self.memory.peak(lambda: pairs.append((before, clock(way)))))
        found |= {
            "peak": max(peaks),
            "alive": self.alive(),
            "seconds": statistics.median(own for _, own in pairs),
            "ratio": statistics.median(own / plain for plain, own in pairs),
        }
        if generating is not None:
            generating(2)
            for _ in pairs:
                steps.append((self._step(self.alone), self._step(generating)))
            found["step_seconds"] = statistics.median(own for _, own in steps)
            found["tokens_of_plain"] = statistics.median(p / own for p, own in steps)
        return found

    def plain(self) -> object:
        return self.forward(self.model.backbone, self.inputs)

    def alone(self, steps: int) -> Tensor:
        return self.generate(self.model.backbone, steps)

    def alive(self) -> int:
        return self.memory.alive() - self.inputs.nbytes - self.ids.nbytes

    def _step(self, generate: Callable[[int], object]) -> float:
        short, long = (self.clock(lambda: generate(n)) for n in (1, 1 + STEPS))
        return max(long - short, 1e-9) / STEPS

    def rows(self) -> dict[str, dict]:
        """Every way: within limits, holding all, a model per task, and one task that is set."""
        model, found = self.model, {}
        mixed = lambda: self.forward(model, self.inputs, task_ids=self.ids)
        tasks = [t % len(model.tasks) for t in range(PROMPTS)]
        tokens = lambda steps: self.generate(model, steps, task_ids=tasks)
        tokens = tokens if self.language else None
        found["plain"] = self.row(self.plain, self.alone if self.language else None)
        tenth = (self.backbone + self.stored) / 10 / 2**30
        limits = {
            "mixed, nothing held": 0.0,
            "mixed, a tenth held": round(tenth, 4),
            "mixed, all held": None,
        }
        for name, limit in limits.items():
            model.serving = Serving(memory_limit_gb=limit)
            found[name] = self.row(mixed, tokens)
            print(name, {k: round(v, 3) for k, v in found[name].items()}, flush=True)
        model.serving = Serving(memory_limit_gb=0)
        mixed()  # the copies are gone
        models = [model.materialize(task).eval() for task in model.tasks]
        found["a model per task"] = self.row(lambda: self.each_alone(models))
        del models
        setting = lambda: model.set_task(model.tasks[0])
        peak = self.memory.peak(setting)
        model.set_task(model.tasks[-1])
        found["set_task"] = {
            "peak": peak,
            "alive": self.alive(),
            "seconds": self.clock(setting),
        }
        model.unset_task()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", nargs="+", default=["vit-b-32", "smollm2-135m"], choices=SHAPES)  # fmt: skip
    parser.add_argument("--factors", nargs="+", default=["auto", "int4"])
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default=None, help="of the backbone; as it is loaded if left out")  # fmt: skip
    parser.add_argument("--drawn", action="store_true", help="experts of random codes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    make = drawn if arguments.drawn else merged
    for what in arguments.on:
        for factors in arguments.factors:
            model = make(what, factors, arguments.budget, arguments.tasks).eval()
            if arguments.dtype is not None:  # what is stored stays as it is
                model.backbone.to(getattr(torch, arguments.dtype))
            case = Case(model.to(arguments.device), arguments.batch, arguments.device)
            key = f"{what}, {arguments.device}, {factors} factors{', drawn' if arguments.drawn else ''}"
            print(key, flush=True)
            on = torch.cuda.get_device_name() if arguments.device == "cuda" else None
            record[key] = {
                "rows": case.rows(),
                "backbone": case.backbone,
                "stored": case.stored,
                "tasks": arguments.tasks,
                "batch": arguments.batch,
                "dtype": str(next(model.backbone.parameters()).dtype),
                "machine": machine(),
                "on": on,
            }
            write_json(RESULTS, record)
            write_page(record)
            del case, model


if __name__ == "__main__":
    main()
