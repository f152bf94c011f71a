"""docs/serving_export.md, of what the stages of smollm2.py left."""

import json
from pathlib import Path
from typing import Any

_INTRO = """# Served by others

A merged SmolLM2-135M of three tasks (a few steps of fine-tuning of the last layers each), exported as adapters and patches and
given to other software. Made by `python examples/serve/smollm2.py prepare | vllm | llama | page`; greedy tokens of every
task for four prompts, {tokens} tokens each, are held against those of `materialize` in transformers, in the same type.

## What was exported

The merged model stores {stored:.3f} of one fine-tuned model and has a relative error of {relative_error:.4f}. The errors below are
of the export alone, against that model.

| export | MB, all tasks | largest rank | tensors left out | largest loss of a tensor's change | outputs of PEFT against `materialize` |
|---|--:|--:|--:|--:|--:|
"""

_LIMITS = """
## What servers read

| server | adapters | what to pass |
|---|---|---|
| PEFT | every rank, all of `-s carry=all` | nothing |
| vLLM | linear layers; the largest rank of any module decides about `--max-lora-rank` (1, 8, 16, 32, 64, 128, 256, 320 or 512). Versions that know one rank per adapter read these too, for alpha is the rank everywhere | `vllm serve BASE --enable-lora --max-lora-rank R --lora-modules TASK=OUT/TASK ...`; `-s pad_rank=true` if it refuses uneven ranks |
| SGLang (not run here) | linear layers, rank and alpha patterns in recent versions | `python -m sglang.launch_server --model-path BASE --lora-paths TASK=OUT/TASK ... --max-lora-rank R` |
| llama.cpp | linear layers and embeddings; one alpha, which it divides by each tensor's rank | `-s pad_rank=true`; then `convert_hf_to_gguf.py BASE`, `convert_lora_to_gguf.py OUT/TASK --base BASE`, and `llama-server -m BASE.gguf --lora TASK.gguf` |

With `-s shared=fold` the base model of a server is `OUT/_pretrained_`. A patch turns a running model into a task's, one model and one task at a time:
`examples/serve/vllm_patch.py` does it through vLLM's `reload_weights`. vLLM's `load_checkpoint_weight_patches`, which takes sparse tensors as they are (and whole
ones in a call of their own), needs weights that are not packed, as on GPUs; it was read, not run.
"""


def page(work: Path, docs: Path) -> None:
    """Write the page, and its figures as JSON."""
    prepared = _read(work / "prepared.json")
    answers = _read(work / "reference.json")["tokens"]["float32"]
    base = answers.pop("base")
    tokens = max(len(answer["tokens"]) for answer in base.values())
    pairs = [
        (a["tokens"], base[k]["tokens"]) for t in answers.values() for k, a in t.items()
    ]
    text = _INTRO.format(tokens=tokens, **prepared)
    exports = {k: v for k, v in prepared.items() if isinstance(v, dict)}
    for name, one in exports.items():
        outputs = "" if one["outputs"] is None else f"{one['outputs']:.1e}"
        rank = one["largest rank"] or ""
        text += f"| {name} | {one['megabytes']:.1f} | {rank} | {one['left out']} | {one['worst error']:.1%} | {outputs} |\n"
    figures: dict[str, Any] = {"exports": exports}
    text += "\n## What servers answered\n\n"
    text += "| server | what | same to the last token | margins of the logit where others part |\n|---|---|--:|---|\n"
    if (work / "vllm.json").exists():
        found = figures["vLLM"] = _read(work / "vllm.json")
        for what, one in found.items():
            if isinstance(one, dict):
                text += _row(found["version"], what.replace("_", " "), one)
    if (work / "llama_served.json").exists():
        found = figures["llama.cpp, served"] = _read(work / "llama_served.json")
        for what, one in found.items():
            if isinstance(one, dict):
                name, kind = what.rsplit(", ", 1)
                size = f"{kind} GGUF, {one['megabytes of a task']:.1f} MB a task"
                text += _row(found["version"], f"{name.replace('_', ' ')}, {size}", one)
    text += (
        f"\nThe base model is asked too where a server has it as one of its models; {sum(a == b for a, b in pairs)} of {len(pairs)} answers of tasks are its own. "
        "Margins are of the reference: how far the token that was taken is before the next. Arithmetic in another order moves logits; "
        "in bfloat16 by more, and the next tokens then follow another path.\n"
    )
    if (work / "llama.json").exists():
        found = figures["llama.cpp"] = _read(work / "llama.json")
        text += (
            f"\nllama.cpp's converter reads the adapters: the {found['tensors']} changes in its GGUF files differ from theirs by "
            f"{found['largest difference']:.1e} at most, relative to their norm. Its server divides one alpha by the rank of each tensor, "
            "so that adapters of uneven ranks, those that are not padded, are scaled by too much and part from the model.\n"
        )
    (docs / "serving_export.md").write_text(text + _LIMITS)
    (docs / "serving_export.json").write_text(json.dumps(figures, indent=1) + "\n")


def _row(server: str, what: str, one: dict[str, Any]) -> str:
    margins = ", ".join(f"{margin:.3g}" for margin in one["margins"])
    return f"| {server} | {what} | {one['same']} of {one['of']} | {margins} |\n"


def _read(file: Path) -> Any:
    return json.loads(file.read_text())
