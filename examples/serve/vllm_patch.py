"""Turn a running vLLM model from task to task by patches: ``python vllm_patch.py WORK MEMORY TASK ...``, run by smollm2.py.

Runs in vLLM's environment, which need not hold this package. vLLM on a CPU keeps packed weights, into which nothing can be
loaded in place, so that patched tensors go through its ``reload_weights``. On GPUs its ``load_checkpoint_weight_patches`` takes
the sparse ones as they are.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # tensors are handed over in memory

from safetensors import safe_open
from vllm import LLM, SamplingParams


def patched(file: Path, base: Path):
    """Every tensor of the base model by its name, as a task has it."""
    with safe_open(file, framework="pt") as new, safe_open(base, framework="pt") as old:
        keys, names = set(new.keys()), json.loads(new.metadata()["changed_params"])
        for name in old.keys():
            value = old.get_tensor(name)
            if name in keys:
                value = new.get_tensor(name)
            elif name in names:
                flat = value.flatten()
                index = new.get_tensor(f"{name}.indices").long()
                flat[index] = new.get_tensor(f"{name}.values")
                value = flat.view(value.shape)
            yield name, value


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
    found = {}
    for task in tasks:
        file = work / "patches" / f"{task}.safetensors"
        weights = list(patched(file, work / "base" / "model.safetensors"))
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        llm.reset_prefix_cache()
        answers = llm.generate(prompts, greedy, use_tqdm=False)
        found[task] = {
            text: list(answer.outputs[0].token_ids)
            for text, answer in zip(ids, answers)
        }
    (work / "vllm_patch.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
