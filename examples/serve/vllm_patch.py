"""Turn a running vLLM model from task to task by patches: ``python vllm_patch.py WORK MEMORY TASK ...``, run by smollm2.py.

Runs in vLLM's environment, which need not hold this package. vLLM keeps NaN for "as it is", so sparse patches are loaded by
``load_checkpoint_weight_patches`` and tensors that are whole by the model's own ``load_weights``.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # apply_model sends a function
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from safetensors import safe_open
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)


def patch(model, file: str, base: str) -> int:
    """Give a model that holds the base model's weights those of a task; the number of tensors."""
    with safe_open(file, framework="pt") as new, safe_open(base, framework="pt") as old:
        keys = set(new.keys())
        names = json.loads(new.metadata()["changed_params"])
        sparse, whole = [], []
        for name in names:
            if name in keys:
                whole.append((name, new.get_tensor(name)))
                continue
            before = old.get_slice(name)
            values = new.get_tensor(f"{name}.values")
            sparse.append(
                CheckpointWeightPatch(
                    name,
                    tuple(before.get_shape()),
                    values.dtype,
                    values,
                    new.get_tensor(f"{name}.indices"),
                )
            )
    if sparse:
        load_checkpoint_weight_patches(model, sparse)
    if whole:
        model.load_weights(whole)
    return len(names)


def main() -> None:
    work, memory, tasks = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    reference = json.loads((work / "reference.json").read_text())
    ids = reference["ids"]
    length = len(reference["tokens"]["float32"]["base"][next(iter(ids))]["tokens"])
    llm = LLM(
        str(work / "base"),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        gpu_memory_utilization=memory,
    )
    greedy = SamplingParams(temperature=0, max_tokens=length)
    prompts = [{"prompt_token_ids": i} for i in ids.values()]
    base, found = str(work / "base" / "model.safetensors"), {}
    for task in tasks:
        file = str(work / "patches" / f"{task}.safetensors")
        # patches are of the base model, which the one before changed
        llm.apply_model(lambda model: len(model.load_weights(restored(base))))
        llm.apply_model(lambda model, file=file: patch(model, file, base))
        llm.reset_prefix_cache()
        answers = llm.generate(prompts, greedy, use_tqdm=False)
        found[task] = {
            text: list(answer.outputs[0].token_ids)
            for text, answer in zip(ids, answers)
        }
    (work / "vllm_patch.json").write_text(json.dumps(found))


def restored(base: str):
    """The base model's tensors, from which every patch starts."""
    with safe_open(base, framework="pt") as old:
        return [(name, old.get_tensor(name)) for name in old.keys()]


if __name__ == "__main__":
    main()
