"""What a machine does per second, of each kind and size of work that ``benchmarks.counting`` counts.

    python -m benchmarks.cost_rates               # of one thread of this machine, as JSON
    python -m benchmarks.cost_rates --threads 2   # by the clock of the wall

Each is the least of several runs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.counting import DECOMPOSITIONS, counting, sized
from benchmarks.floor import Machine
from fusion_bench_didi.quantization.entropy import encode_runs, frequencies

#: Classes of sizes that are timed, in powers of four: operations of a product, numbers of a matrix, numbers of a tensor.
PRODUCTS, MATRICES, TENSORS = range(6, 17), range(1, 11), range(4, 13)
#: Numbers that are coded, and tasks of two merges of next to nothing.
CODED, FEW = 2**20, (2, 150)
#: Tensors of this class and larger come from memory: so many are worked on in turn, as those of several tasks are.
LARGE, IN_TURN = 8, 8
#: Seconds that one kind of work of one size is tried for, and runs of it at least.
TRIED, RUNS = 0.03, 3
#: What a page calls the kinds of work that get on by size.
KINDS = {
    "product": "products",
    "fresh": "elementwise",
    "pass": "elementwise",
    **dict.fromkeys(DECOMPOSITIONS.values(), "decompositions"),
}


@dataclass(frozen=True)
class Rates:
    """Per second; ``call`` and ``fixed`` are seconds.

    Args:
        sized: of the kinds that get on by size, ``kind size`` as the counts have them: operations of products, l s^2 of
            decompositions, numbers of elementwise operations with a result of as many (``fresh``) and without (``pass``); what
            one call costs at any size is not in it.
        read, write, hashed: bytes.
        coded: numbers.
        sent: bytes to another process.
        call: of one operation of torch on next to nothing, with the Python around it.
        fixed: of a merge of nothing.
    """

    sized: Mapping[str, float]
    read: float
    write: float
    hashed: float
    coded: float
    sent: float
    call: float
    fixed: float

    @classmethod
    def measured(
        cls, files: Path | None = None, clock: Callable[[], float] = time.process_time
    ) -> "Rates":
        """Of this process, by a clock.

        Args:
            files: a checkpoint's directory, which is read; some that were just written if None.
        """
        call, fixed = _overheads()  # forks, which no thread of torch outlives
        with tempfile.TemporaryDirectory() as home:
            if files is None:
                files = Path(home)
                tensors = {f"w{i}": torch.ones(2**22) for i in range(16)}
                save_file(tensors, files / "model.safetensors")
            machine = Machine.measured(files, clock=clock)
        content, sent = bytes(2**26), torch.ones(2**24)
        symbols = torch.randn(CODED).mul(2).round().clamp(-8, 7).long() + 8
        table = frequencies(symbols, 16)

        def least(function: Callable[[], object]) -> float:
            return _least(function, clock)

        return cls(
            sized=_by_size(least),
            read=machine.read,
            write=machine.write,
            hashed=len(content) / least(lambda: hashlib.sha256(content).digest()),
            coded=CODED / least(lambda: encode_runs([(symbols, table)])),
            sent=sent.nbytes / (2 * least(lambda: sent.clone())),
            call=call,
            fixed=fixed,
        )

    def of(self, kind: str) -> float:
        """The rate of a kind and size; of the nearest size that was timed."""
        name, _, size = kind.partition(" ")
        sizes = {k.partition(" ")[2]: v for k, v in self.sized.items() if k.startswith(name + " ")}  # fmt: skip
        return sizes[min(sizes, key=lambda known: abs(int(known) - int(size)))]


def beside(processes: int, threads: int = 1, files: Path | None = None) -> Rates:
    """Of so many processes at once, on this machine as it is now: the mean of each rate."""
    line = [sys.executable, "-m", "benchmarks.cost_rates", "--threads", str(threads)]
    line += ["--files", str(files)] if files else []
    running = [
        subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    found = []
    for process in running:
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(line)} ended with {process.returncode}")
        found.append(json.loads(out.splitlines()[-1]))
    return mean_of([Rates(**one) for one in found])


def mean_of(rates: list[Rates]) -> Rates:
    """The mean of seconds per work, of each rate."""
    told = [asdict(one) for one in rates]

    def mean(values: list[float]) -> float:
        return len(values) / sum(1 / max(value, 1e-30) for value in values)

    by_size = {k: mean([one["sized"][k] for one in told]) for k in told[0]["sized"]}
    plain = {k: mean([one[k] for one in told]) for k in told[0] if k != "sized"}
    return Rates(sized=by_size, **plain)


def _least(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of one run, the least of some."""
    found: list[float] = []
    until = time.perf_counter() + TRIED
    while len(found) < RUNS or time.perf_counter() < until:
        begun = clock()
        function()
        found.append(clock() - begun)
    return min(found)


def _by_size(least: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Rates of what gets on by size, less the seconds of a call on next to nothing."""
    nothing = torch.ones(1)
    alone = least(lambda: nothing.add(nothing))
    rates: dict[str, float] = {}
    for size in PRODUCTS:
        # a tall matrix by a narrow one, as range finders have it: 2 * 8 n * 4 n * n operations
        n = max(round((2 * 4**size / 64) ** (1 / 3)), 1)
        a, b = torch.randn(8 * n, 4 * n), torch.randn(4 * n, n)
        took = least(lambda: a @ b) - alone
        rates[sized("product", 2 * a.numel() * n)] = 2 * a.numel() * n / max(took, 1e-7)
    for size in MATRICES:
        s = round((2 * 4**size) ** 0.5)
        tall = torch.randn(s, s)
        square = tall @ tall.mT + s * torch.eye(s)
        for kind in DECOMPOSITIONS.values():
            took = least(lambda: getattr(torch.linalg, kind)(square)) - alone
            rates[sized(kind, s * s)] = s**3 / max(took, 1e-7)
    for size in TENSORS:
        numbers = 2 * 4**size
        together = IN_TURN if LARGE <= size < TENSORS[-2] else 1
        operands = [_operands(numbers) for _ in range(together)]
        for kind, functions in _ELEMENTWISE.items():
            each = [least(lambda: _in_turn(f, operands)) / together - alone for f in functions]  # fmt: skip
            took = max(sum(each), 1e-7)
            rates[sized(kind, numbers)] = len(functions) * numbers / took
    return rates


#: What a merge does most of, by the number of numbers: with a result of as many, and without.
_ELEMENTWISE: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], object], ...]] = {
    "fresh": (
        lambda a, b, codes: a - b,
        lambda a, b, codes: a * b,
        lambda a, b, codes: a.abs(),
        lambda a, b, codes: a.index_select(0, codes),
    ),
    "pass": (
        lambda a, b, codes: torch.linalg.vector_norm(a),
        lambda a, b, codes: a.mul_(1.0),
    ),
}


def _operands(numbers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors, and codes of a few values of the first."""
    codes = torch.randint(min(numbers, 256), (numbers,), dtype=torch.int32)
    return torch.randn(numbers), torch.randn(numbers), codes


def _in_turn(function: Callable[..., object], operands: list[tuple]) -> None:
    for each in operands:
        function(*each)


def _overheads() -> tuple[float, float]:
    """Seconds per call and of a merge of nothing, by two merges of tiny matrices; seconds of the processor."""
    from benchmarks.processes import Job
    from benchmarks.scaling import measured, small_pool
    from fusion_bench_didi.method.didi import DiDiMerging

    found = []
    for count in FEW:
        pool = small_pool(count)
        with tempfile.TemporaryDirectory() as home:

            def merge(to: str = "merged") -> None:
                DiDiMerging(budget=0.2, output_dir=str(Path(home) / to)).run(pool)

            runs = [Job(1, measured(lambda i=i: merge(f"m{i}"))).results()[0] for i in range(RUNS)]  # fmt: skip
            with counting() as counts:
                merge("counted")
        calls = sum(part["calls"] for part in counts.values())
        found.append((calls, min(run["cpu"] for run in runs)))
    (few, short), (many, long) = found
    call = (long - short) / (many - few)
    return call, max(short - call * few, 0.0)


def seconds(
    counts: Mapping[str, Mapping[str, float]], rates: Rates, processes: int = 1
) -> dict[str, float]:
    """Seconds of the slowest of so many processes, by kind of work.

    Args:
        counts: of ``benchmarks.counting``, with bytes ``written`` and ``hashed``.
    """
    mean = {
        kind: counts["own"].get(kind, 0) + counts["shared"].get(kind, 0) / processes
        for kind in {*counts["own"], *counts["shared"]}
    }
    told = mean.get("messages", 0)
    found = dict.fromkeys(("products", "decompositions", "elementwise"), 0.0)
    for kind, work in mean.items():
        if " " in kind:
            found[KINDS[kind.partition(" ")[0]]] += work / rates.of(kind)
    return {
        **found,
        "reading": mean.get("read", 0) / rates.read,
        "coding": mean.get("coded", 0) / rates.coded,
        "writing": mean.get("written", 0) / rates.write
        + mean.get("hashed", 0) / rates.hashed,
        "messages": told / rates.sent if processes > 1 else 0.0,
        "calls": rates.call * mean["calls"],
        "start": rates.fixed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--files", type=Path, help="a checkpoint's directory, to read")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    print(json.dumps(asdict(Rates.measured(arguments.files, clock))))


if __name__ == "__main__":
    main()
