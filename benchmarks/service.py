"""``didi serve`` under load on this machine: errors, memory over time, and latencies beside the plain model's.

    python -m benchmarks.service --minutes 10

A small language model of drawn weights with eight drawn experts (what is measured is the service, not what it says) is served by
the command itself. Clients ask at random for tasks, prompts and lengths, each as soon as it has its answer, for so many minutes;
every twentieth request is a bad one. The same load then goes to the same model without experts for a fifth of the time.
Adds to benchmarks/results/service.json and writes docs/service.md.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.checkpoints import SHAPES, Shape
from benchmarks.slim_serving import drawn
from benchmarks.suites import NOTES, in_words, machine, write_json
from fusion_bench_didi.models.dynamic import DynamicModel

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "service.json", HERE.parent / "docs" / "service.md"
WORDS, TOKENS, LONGEST, TASKS = 4096, 16, 48, 8
SIZES = dict(
    vocab_size=WORDS,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    eos_token_id=1,
    max_position_embeddings=256,
)
#: Requests that are refused, and with what; to a task where they name none.
BAD = [
    (404, {"model": "nobody", "prompt": "w2"}),
    (400, {"prompt": ""}),
    (400, {"prompt": "w2", "max_tokens": 10**6}),
    (400, {"prompt": "w2", "temperature": 1.0}),
    (400, {"prompt": "w2 " * 2000}),
    (413, {"prompt": "w2 " * 10**6}),
]


def write_models(place: Path) -> dict[str, Path]:
    """The merged model and the plain one, of one base."""
    SHAPES["service"] = Shape(lambda: LlamaForCausalLM(LlamaConfig(**SIZES)))
    model = drawn("service", "int4", 0.5, TASKS)
    base = place / "base"
    model.backbone.save_pretrained(base)
    names = ["<pad>", "<end>", *(f"w{i}" for i in range(2, WORDS))]
    words = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(models.WordLevel(words, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", unk_token="<pad>", eos_token="<end>")
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(base)
    known = {"backbone": {"source": str(base)}}
    experts = {t: dict(e.deltas.items()) for t, e in model.modulators.items()}
    for name, held in {"merged": experts, "plain": {"plain": {}}}.items():
        backbone = LlamaForCausalLM.from_pretrained(base)
        made = DynamicModel(backbone, {}, held, unit_bits=model.unit_bits, info=known)
        made.save_pretrained(place / name)
    return {"merged": place / "merged", "plain": place / "plain"}


class Service:
    """The command in a process of its own.

    Args:
        directory: of the model.
        settings: limits.
    """

    def __init__(self, directory: Path, settings: list[str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        line = [sys.executable, "-m", "fusion_bench_didi", "serve", str(directory)]
        line += ["--port", str(port), *(f"-s{one}" for one in settings)]
        self.process = subprocess.Popen(
            line, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.at = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                self.ask("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise SystemExit("The service did not begin.")

    def ask(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        data = None if body is None else json.dumps(body).encode()
        kind = {"content-type": "application/json"}
        request = urllib.request.Request(self.at + path, data, kind)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    @property
    def memory(self) -> float:
        """MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def load(service: Service, seconds: float, clients: int) -> dict:
    """What clients found out in so many seconds."""
    names = [one["id"] for one in service.ask("/v1/models")[1]["data"]]
    until, lock = time.monotonic() + seconds, threading.Lock()
    taken: list[float] = []
    seen: Counter = Counter()
    wrong: list[str] = []

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            if draw.random() < 0.05:
                expected, body = draw.choice(BAD)
                body = {"model": names[0], **body}
            else:
                words = draw.choices(range(2, WORDS), k=draw.randint(2, LONGEST))
                prompt = " ".join(f"w{word}" for word in words)
                expected, body = 200, {
                    "model": draw.choice(names),
                    "prompt": prompt,
                    "max_tokens": draw.randint(1, TOKENS),
                }
            begin = time.perf_counter()
            try:
                status, answer = service.ask("/v1/completions", body)
            except OSError as error:
                status, answer = 0, {"error": str(error)}
            with lock:
                seen[status] += 1
                if status == 200:
                    taken.append(time.perf_counter() - begin)
                if status != expected or (status != 200 and "error" not in answer):
                    wrong.append(f"{status} for {expected}: {answer}"[:300])

    memory = []
    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        memory.append((round(seconds - (until - time.monotonic()), 1), service.memory))
        time.sleep(max(min(seconds / 40, until - time.monotonic()), 0.05))
    for thread in threads:
        thread.join()
    cuts = statistics.quantiles(taken, n=100)
    return {
        "seconds": seconds,
        "answers": {str(status): count for status, count in sorted(seen.items())},
        "wrong": wrong,
        "p50": cuts[49],
        "p99": cuts[98],
        "memory": memory,
    }


def write_page(record: dict) -> None:
    lines = [
        "# A merged model as a service",
        "",
        "`pip install 'fusion-bench-didi[serve]'`, then `didi serve merged`: `/v1/models` names the tasks (and `routed`, where a router",
        "is saved); `/v1/completions` continues prompts and `/v1/chat/completions` conversations as OpenAI's do, greedily; `/v1/classify`",
        "answers for classifiers of texts (`input`), images (`image`, base64) and, with `--heads`, CLIP towers. The `model` of a request is a",
        "task, whose own tokenizer or image processor makes its inputs.",
        "",
        "Requests that come within `wait_ms` become one batch, whatever their tasks, and one mixed forward. Everything asked is bounded",
        "(`didi serve -h`): bodies (413), inputs and tokens per request (400), what waits (429, all of a request or none). It listens at",
        "127.0.0.1 unless `--host` says otherwise, knows no users and no encryption: put a proxy before it. Files are read as data.",
        "",
        "## Under load",
        "",
        f"`python -m benchmarks.service` on {in_words(record['machine'])}, other work beside it: {record['clients']} clients on loopback, each",
        f"asking anew once it is answered: prompts of 2 to {LONGEST} tokens, 1 to {TOKENS} more, one in twenty requests bad. A language model of",
        f"{record['parameters'] / 1e6:.0f} M drawn weights with {TASKS} drawn experts; *plain* is the same without experts.",
        "",
        "| served | minutes | answered | refused as they should be | anything else | p50, ms | p99, ms | memory, MiB: at a tenth of the time, half, end |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in record["rows"].items():
        good = row["answers"].get("200", 0)
        refused = sum(row["answers"].values()) - good - len(row["wrong"])
        memory = [row["memory"][int(part * (len(row["memory"]) - 1))][1] for part in (0.1, 0.5, 1)]  # fmt: skip
        cells = [
            f"{row['seconds'] / 60:.1f}",
            str(good),
            str(refused),
            str(len(row["wrong"])),
            f"{1e3 * row['p50']:.0f}",
            f"{1e3 * row['p99']:.0f}",
            ", ".join(f"{mib:.0f}" for mib in memory),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", (NOTES / "service.md").read_text().rstrip()]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict = {"machine": machine(), "clients": arguments.clients, "rows": {}}
    with tempfile.TemporaryDirectory() as scratch:
        places = write_models(Path(scratch))
        model = LlamaForCausalLM.from_pretrained(Path(scratch) / "base")
        record["parameters"] = sum(p.numel() for p in model.parameters())
        del model
        runs = {
            "eight tasks": ("merged", 1.0, []),
            "eight tasks, nothing held": ("merged", 0.2, ["memory_limit_gb=0"]),
            "plain": ("plain", 0.2, []),
        }
        for name, (which, part, settings) in runs.items():
            service = Service(places[which], settings)
            try:
                seconds = 60 * arguments.minutes * part
                found = load(service, seconds, arguments.clients)
            finally:
                service.close()
            record["rows"][name] = found
            told = {k: v for k, v in found.items() if k != "memory"}
            print(name, told, found["memory"][::10], flush=True)
    write_json(RESULTS, record)
    write_page(record)
    if any(row["wrong"] for row in record["rows"].values()):
        raise SystemExit("Some requests were not answered as they should be.")


if __name__ == "__main__":
    main()
