"""Saved files that were damaged, or made to do harm: ``python -m tests.fuzz --inputs 100000``.

An input is a small saved model of some kind with a few changes: bits and bytes, fields of its JSON files, headers of its
tensors, files replaced by links, pipes and directories. Half of the changes are sealed again, as by someone who knows how,
so that they get past the checksums. Whatever is read must load, or be refused by this package's own error; it may not hang,
run code, or take much more memory than the files are large.

Input i of a case is the same every time, so that ``--only CASE --first i --inputs 1`` shows it again.
"""

import argparse
import collections
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).parent))  # as pytest has it

import fuzz_inputs as more
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusion_bench_didi.artifacts import load_artifact, save_artifact
from fusion_bench_didi.checkpoint.fields import CHECKSUM, checksum
from fusion_bench_didi.deltas.banded import BandedLowRankDelta
from fusion_bench_didi.deltas.entries import (
    ScatteredDelta,
    SeededDelta,
    UniformDelta,
    between_ends,
    drawn,
    signs,
)
from fusion_bench_didi.deltas.lossless import LosslessDelta
from fusion_bench_didi.deltas.masks import MaskedDelta, SparseDelta
from fusion_bench_didi.deltas.plain import (
    DenseDelta,
    LowRankDelta,
    OwnDelta,
    SpectralDelta,
)
from fusion_bench_didi.deltas.precision import Precision
from fusion_bench_didi.deltas.quantized import AffineDelta
from fusion_bench_didi.errors import DiDiError
from fusion_bench_didi.lowrank.factors import LowRankFactors
from fusion_bench_didi.models.dynamic import DiDiModel, DynamicModel
from fusion_bench_didi.quantization.rounding import round_factors
from fusion_bench_didi.recombination.library import ModularExpert
from fusion_bench_didi.recombination.model import RecombinedModel
from fusion_bench_didi.recombination.objectives import Evaluation
from fusion_bench_didi.recombination.search import _load as load_state
from fusion_bench_didi.routers import make_router
from fusion_bench_didi.task_vectors.lora_adapter import AdapterSource
from fusion_bench_didi.task_vectors.sources import ModuleSource

SECONDS = 20  # a second and more may be spent on a pattern alone
MEMORY = 2**27
ROUND = 1000  # inputs per process: memory does not add up, and a crash costs little
M, N = 12, 10


class Body(nn.Module):
    """Something of each: a convolution, matrices, vectors, a tied head and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, M, 2)
        self.first = nn.Linear(N, M)
        self.second = nn.Linear(M, N)
        self.norm = nn.BatchNorm1d(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x)))


def body() -> Body:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Body().eval()


def every_form() -> tuple[dict, dict]:
    """Deltas of all stored forms."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    mn, nm, conv = (M, N), (N, M), (M, 2, 2, 2)
    few, three = Precision("int4", 4), Precision("int3", 3)
    float32 = Precision("float32", 32, torch.float32)
    shared = {
        "first.weight": few.bases(mn, draw(M, 3), draw(2, N)),
        "second.weight": float32.bases(nm, draw(N, 3), draw(M, M)),
        "conv.weight": DenseDelta(conv, draw(*conv)),
        "first.bias": AffineDelta.of(draw(M)),
    }
    product = LowRankFactors(draw(M, 2), draw(2, 8))
    mask = draw(*conv) > 0
    experts = {
        "a": {
            "first.weight": few.core(mn, draw(3, 2)),
            "second.weight": float32.core(nm, draw(3, M)),
            "conv.weight": MaskedDelta.of(mask, 0.5),
            "first.bias": DenseDelta((M,), draw(M).bfloat16()),
            "norm.running_mean": OwnDelta((N,), draw(N)),
            "norm.num_batches_tracked": OwnDelta((), torch.tensor(3)),
            "conv.bias": SparseDelta.of(draw(M) * (draw(M) > 1), torch.float32),
            "norm.weight": UniformDelta.of(*between_ends(draw(N), 3), 3),
            "norm.bias": _scattered(draw(N)),
        },
        "b/c.d": {
            "first.weight": few.core(mn, draw(3, 2)),
            "second.weight": float32.core(nm, draw(3, M)),
            "conv.weight": three.low_rank(conv, product, None)[0],
            "norm.weight": SparseDelta.of(draw(N), torch.float16),
            "conv.bias": _seeded(draw(M)),
            "second.bias": LowRankDelta((N,), draw(N, 1), draw(1, 1)),
        },
        "e": {
            "conv.weight": Precision("int2", 2).dense(conv, [(draw(M, 8), None)])[0][0],
            "second.bias": AffineDelta.of(draw(N)),
            "second.weight": _banded(LowRankFactors(draw(N, 3), draw(3, M))),
            "norm.weight": LosslessDelta.of(draw(N), body().norm.weight.detach()),
            "norm.bias": SpectralDelta((N,), draw(N, 1), draw(1), draw(1, 1)),
        },
    }
    return shared, experts


def _banded(factors: LowRankFactors) -> BandedLowRankDelta:
    pairs = zip(factors.up.split(1, 1), factors.down.split(1), (8, 3, 2))
    bands = [round_factors(LowRankFactors(u, d), bits=bits) for u, d, bits in pairs]
    return BandedLowRankDelta.of(factors.shape, bands)


def _scattered(value: Tensor) -> ScatteredDelta:
    kept = value > 0
    return ScatteredDelta.of(kept, *signs(value[kept], 0.5), 1)


def _seeded(value: Tensor) -> SeededDelta:
    values = value[drawn(7, 2**31, len(value))].bfloat16()
    return SeededDelta.of((len(value),), values, None, 16, seed=7, keep=2**31)


@dataclass(frozen=True)
class Case:
    """A kind of saved files.

    Args:
        write: makes a directory.
        read: reads it, and works out what it stands for.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]


def _tasks_of(model: nn.Module) -> None:
    """Decode everything that a loaded model holds."""
    if isinstance(model, DynamicModel):
        for task in model.tasks:
            model.set_task(task)
        model.unset_task()
        model.storage


def _read_model(place: Path) -> None:
    _tasks_of(load_artifact(place, body()))


def _didi(place: Path) -> None:
    DiDiModel(body(), *every_form(), unit_bits=10000).save_pretrained(place)


def _routed(place: Path) -> None:
    shared, experts = every_form()
    model = DynamicModel(body(), shared, experts, unit_bits=10000)
    router = make_router("mlp", model.tasks, layers=["first"], pooling="mean")
    g = torch.Generator().manual_seed(2)
    labels = torch.arange(3).repeat(6)
    router.fit(torch.randn(18, M, generator=g), labels, epochs=1, width=4)
    model.attach_router(router).save_pretrained(place)


def _modules() -> dict[str, ModularExpert]:
    shared, experts = every_form()
    plain = {"second.bias": AffineDelta.of(torch.linspace(-1, 1, N))}
    forms = {k: v for k, v in shared.items() if k != "first.bias"}
    own = {t: {k: v for k, v in e.items() if k in forms} for t, e in experts.items()}
    found = (
        ModularExpert("all-1", "all", tuple(experts), "didi@0.1", forms, own),
        ModularExpert("rest-2", "rest", ("a", "e"), "average", plain, {}),
    )
    return {module.id: module for module in found}


def _recombined(place: Path) -> None:
    modules = _modules()
    chains = {"a": list(modules), "b/c.d": ["all-1"], "e": list(modules)}
    model = RecombinedModel(body(), modules, chains, unit_bits=10000)
    model.save_pretrained(place)


def _individuals(place: Path) -> None:
    models = [(task, _moved(i + 1)) for i, task in enumerate("ab")]
    base = body()
    types = {name: torch.float32 for name, _ in base.named_parameters()}
    save_artifact(models, place, base=base, types=types)


def _static(place: Path) -> None:
    base = body()
    types = {name: torch.float16 for name, _ in base.named_parameters()}
    save_artifact(_moved(1), place, base=base, types=types)


@torch.no_grad()
def _moved(seed: int) -> Body:
    g, model = torch.Generator().manual_seed(seed), body()
    for value in model.parameters():
        value += 0.1 * torch.randn(value.shape, generator=g)
    return model


def _smile(place: Path) -> None:
    from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear

    model, tuned = body(), [_moved(1), _moved(2)]
    model.first = SmileMoELinear(model.first, [m.first for m in tuned], gate_k=2, k=3)
    _mixture(model, place)


def _wemoe(place: Path) -> None:
    from fusion_bench.models.we_moe import WeightEnsemblingMoE

    model, tuned = body(), [_moved(1), _moved(2)]
    with torch.no_grad():
        model.second.weight += 0.1
    model.first = WeightEnsemblingMoE(
        N, model.first, [m.first for m in tuned], router_hidden_layers=1
    )
    _mixture(model, place)


def _mixture(model: nn.Module, place: Path) -> None:
    base = body()
    types = {name: torch.float32 for name, _ in base.named_parameters()}
    save_artifact(model, place, base=base, types=types)


def _write_adapter(place: Path) -> None:
    place.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"second": 3, r"conv\d*": 2},
        "alpha_pattern": {"first": 8},
        "init_lora_weights": True,
        "use_rslora": False,
        "modules_to_save": ["norm"],
    }
    (place / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"base_model.model.norm.weight": torch.ones(N)}
    for name, (m, n), r in (("first", (M, N), 2), ("second", (N, M), 3)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(r, n)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(m, r)
    save_file(tensors, place / "adapter_model.safetensors")


def _read_adapter(place: Path) -> None:
    base = ModuleSource(body(), "base")
    adapter = AdapterSource.of_directory(place, "task", base.infos())
    if not adapter.faults:
        for name in adapter.infos():
            adapter.applied(name, base.read(name)) if name in base.infos() else None


class _Space:
    shape = (2, 2, 3)


def _write_state(place: Path) -> None:
    place.mkdir()
    one = Evaluation([[[0, 1], [2, 0]], [[0, 0], [1, 0]]], 0.5, 1.5, {"a": 0.4, "b": 1})
    state = {"search": {"seed": 0}, "generation": 1, "kept": [0, 1]}
    state["evaluations"] = [one.as_dict(), one.as_dict()]
    (place / "search.json").write_text(json.dumps(state))


def _read_state(place: Path) -> None:
    load_state(place / "search.json", {"seed": 0}, _Space())


CASES = {
    "model": Case(_didi, _read_model),
    "router": Case(_routed, _read_model),
    "modules": Case(_recombined, _read_model),
    "individuals": Case(_individuals, _read_model),
    "static": Case(_static, _read_model),
    "smile": Case(_smile, _read_model),
    "wemoe": Case(_wemoe, _read_model),
    "adapter": Case(_write_adapter, _read_adapter),
    "state": Case(_write_state, _read_state),
    "shards": Case(more.write_shards, more.read_weights),
    "pickles": Case(more.write_pickles, more.read_weights),
    "float8": Case(more.write_float8, more.read_weights),
    "rows": Case(more.write_rows, more.read_rows),
    "old": Case(more.write_old, more.read_old),
}

# --- changes ------------------------------------------------------------------

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 255, 2**16, 40000),
    *(2**31, 2**32, 2**62, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", ".", "..", "../x", "a/b", "/etc/passwd", "\0", "\ud800", "é", "x" * 999),
    *(
        [],
        {},
        [[]],
        [1, 2],
        [-1],
        [40000, 40000],
        [2**40] * 3,
        {"_target_": "os.system"},
    ),
    *("(a|aa)+$", "(?R)", "[", "dense", "own", "sparse", "masked", "core", "int8"),
)


def mutate(place: Path, rng: random.Random) -> None:
    """Change a few things, and perhaps seal them again."""
    seal = rng.random() < 0.6
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix != ".md")
        if not files:
            return
        file = rng.choice(files)
        if rng.random() < 0.04:
            _replace(file, place, rng)
        elif file.suffix == ".json" and rng.random() < 0.7:
            _mutate_json(file, rng)
        elif file.suffix == ".safetensors" and rng.random() < 0.6:
            _mutate_header(file, rng)
        else:
            _mutate_bytes(file, rng)
    if seal:
        reseal(place)


def reseal(place: Path) -> None:
    """Make all checksums right."""
    files = (path for path in place.rglob("*.json") if path.is_file())
    for file in sorted(files, key=lambda path: -len(path.parts)):
        try:
            found = json.loads(file.read_text())
            _redigest(found, file.parent)
            if CHECKSUM in found:
                found[CHECKSUM] = checksum(found)
            file.write_text(json.dumps(found))
        except (OSError, ValueError, TypeError, RecursionError):
            continue


def _redigest(value: Any, place: Path) -> None:
    if isinstance(value, dict):
        home = value.get("directory")
        for key, inner in value.items():
            if key in ("files", "backbone_files") and isinstance(inner, dict):
                sub = home if isinstance(home, str) else ""
                sub = "backbone" if key == "backbone_files" else sub
                for name in inner:
                    inner[name] = _sha(place / sub / name) or inner[name]
            elif key == "sha256":
                value[key] = _sha(place / "router.safetensors") or inner
            else:
                _redigest(inner, place)
    elif isinstance(value, list):
        for inner in value:
            _redigest(inner, place)


def _sha(file: Path) -> str | None:
    try:
        regular = file.is_file()
    except ValueError:
        regular = False
    return hashlib.sha256(file.read_bytes()).hexdigest() if regular else None


def _replace(file: Path, place: Path, rng: random.Random) -> None:
    kind = rng.choice(("gone", "fifo", "directory", "link", "loop", "device", "empty"))
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "empty":
        file.touch()
    elif kind != "gone":
        outside = place.parent / "outside"
        target = {"link": outside, "loop": file, "device": "/dev/zero"}[kind]
        os.symlink(target, file)


def _mutate_bytes(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) or 1)
    kind = rng.choice(("bit", "bit", "byte", "cut", "insert", "repeat", "front"))
    if kind == "cut" or not data:
        del data[at:]
    elif kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.randrange(256)
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == "repeat":
        data[at:at] = data[at : at + rng.randrange(1, 200)]
    else:
        at = rng.randrange(min(16, len(data)))
        data[at] = rng.choice((0, 1, 255, rng.randrange(256)))
    file.write_bytes(data)


def _mutate_json(file: Path, rng: random.Random) -> None:
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return _mutate_bytes(file, rng)
    if rng.random() < 0.02:
        text = rng.choice(
            ("[" * 10**5, '{"a":' * 10**5, "1" * 5000, "", "null", "\ufeff{}")
        )
        file.write_text(text)
        return
    file.write_text(json.dumps(_changed(found, rng)))


def _changed(found: Any, rng: random.Random) -> Any:
    nodes = list(_nodes(found))
    if not nodes:
        return rng.choice(VALUES)
    # names of what is stored are many, and fields are few
    owner, key = rng.choice(nodes)
    shallow = [n for n in nodes if n[0] is found]
    if shallow and rng.random() < 0.3:
        owner, key = rng.choice(shallow)
    kind = rng.choice(("value", "value", "gone", "other", "near", "twice", "key"))
    if kind == "gone":
        del owner[key]
    elif kind == "other":
        other = rng.choice(nodes)
        owner[key] = copy.deepcopy(other[0][other[1]])
    elif kind == "near" and isinstance(owner[key], (int, float)):
        owner[key] = owner[key] + rng.choice((-1, 1, 2, -owner[key]))
    elif kind == "twice" and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    elif kind == "key" and isinstance(owner, dict):
        owner[str(rng.choice(VALUES))] = owner.pop(key)
    else:
        owner[key] = copy.deepcopy(rng.choice(VALUES))
    return found


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, inner in list(pairs):
        yield value, key
        yield from _nodes(inner)


def _mutate_header(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    try:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
    except (struct.error, ValueError):
        return _mutate_bytes(file, rng)
    header = _changed(header, rng) if rng.random() < 0.5 else _retyped(header, rng)
    try:
        text = json.dumps(header).encode()
    except UnicodeEncodeError:
        return
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def _retyped(header: Any, rng: random.Random) -> Any:
    """The same bytes as numbers of another type, or in another shape."""
    entries = [v for v in header.values() if isinstance(v, dict) and "shape" in v]
    if not entries:
        return header
    entry = rng.choice(entries)
    types = {1: ("I8", "U8", "BOOL", "F8_E4M3"), 2: ("F16", "BF16", "I16", "U16")}
    types |= {4: ("F32", "I32", "U32"), 8: ("F64", "I64", "U64", "C64")}
    for same in types.values():
        if entry.get("dtype") in same and rng.random() < 0.6:
            entry["dtype"] = rng.choice(same)
            return header
    shape = entry["shape"]
    if isinstance(shape, list) and all(isinstance(s, int) for s in shape):
        count = 1
        for side in shape:
            count *= side
        choices = [[count], [1, count], [count, 1], [1, 1, count], shape[::-1]]
        entry["shape"] = rng.choice(choices)
    return header


# --- runs ---------------------------------------------------------------------


class Hangs(BaseException):
    pass


class RunsCode(BaseException):
    pass


FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)
_watching = _hooked = False


def _watch(event: str, arguments: tuple) -> None:
    if _watching and event in FORBIDDEN:
        raise RunsCode(f"{event}{arguments}")


def _alarm(*_: Any) -> None:
    raise Hangs


def in_memory() -> Path | None:
    """A directory that no disk is waited for, where there is one."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else None


@contextmanager
def limits() -> Iterator[None]:
    """Time and memory of what is read in the block."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = pages * resource.getpagesize() + MEMORY
    old = signal.signal(signal.SIGALRM, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (now, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def run_input(case: Case, seed_files: Path, place: Path, number: int, name: str) -> str:
    """What became of one input: ``read``, ``refused``, or the fault."""
    global _watching
    rng = random.Random(f"{name} {number}")
    shutil.copytree(seed_files, place)
    mutate(place, rng)
    _watching = True
    try:
        with limits():
            case.read(place)
        return "read"
    except (DiDiError, FileNotFoundError):
        return "refused"
    except (Exception, Hangs, RunsCode) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            f for f in traceback.extract_tb(error.__traceback__) if "didi" in f.filename
        ]
        where = ours[-1] if ours else last
        text = str(error).splitlines()[0][:90] if str(error) else ""
        return f"{type(error).__name__}: {text} at {Path(where.filename).name}:{where.lineno}"
    finally:
        _watching = False
        shutil.rmtree(place)


def run(names: list[str], inputs: int, first: int = 0) -> dict[str, list[str]]:
    """Outcomes by input, each round in a process of its own.

    Returns:
        faults -> the inputs that show them; and how many were ``read`` and ``refused``.
    """
    global _hooked
    if not _hooked:  # there is no way to take it off again
        sys.addaudithook(_watch)
        _hooked = True
    outcomes: dict[str, list[str]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory(dir=in_memory()) as directory:
        home = Path(directory)
        (home / "outside").write_text("{}")
        for name in names:
            CASES[name].write(home / name)
            CASES[name].read(home / name)  # what is unchanged is read
        numbers = list(range(first, first + inputs))
        jobs = [(names[i % len(names)], i) for i in numbers]
        for start in range(0, len(jobs), ROUND):
            for job, outcome in _round(home, jobs[start : start + ROUND]):
                outcomes[outcome].append(" ".join(map(str, job)))
    return outcomes


def _round(home: Path, jobs: list) -> Iterator[tuple[tuple, str]]:
    """Run inputs in a child process; the one that ends it is a fault, and the rest goes on in another."""
    while jobs:
        results = home / "results"
        results.write_text("")
        child = os.fork()
        if child == 0:
            with results.open("a") as file:
                for name, number in jobs:
                    outcome = run_input(
                        CASES[name], home / name, home / "input", number, name
                    )
                    file.write(json.dumps(outcome) + "\n")
                    file.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = [json.loads(line) for line in results.read_text().splitlines()]
        yield from zip(jobs, found)
        jobs = jobs[len(found) :]
        if status and jobs:
            shutil.rmtree(home / "input", ignore_errors=True)
            yield jobs[0], f"the process ended with status {status}"
            jobs = jobs[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    outcomes = run(arguments.only, arguments.inputs, arguments.first)
    for outcome, inputs in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(f"{len(inputs):8d}  {outcome}  ({', '.join(inputs[:3])})")
    return int(bool(outcomes.keys() - {"read", "refused"}))


if __name__ == "__main__":
    sys.exit(main())
