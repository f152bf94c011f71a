"""Greedy tokens of llama.cpp under GGUF adapters: ``python llama_generate.py WORK TOKENS TASK ...``, run by smollm2.py.

Runs in the environment of llama-cpp-python, which need not hold this package.
"""

import json
import sys
from pathlib import Path

from llama_cpp import Llama


def main() -> None:
    work, count, tasks = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    reference = json.loads((work / "reference.json").read_text())
    found = {}
    for task in ("base", *tasks):
        adapter = None if task == "base" else str(work / f"{task}.gguf")
        model = Llama(
            str(work / "base.gguf"), lora_path=adapter, n_ctx=256, verbose=False
        )
        found[task] = {}
        for text, ids in reference["ids"].items():
            model.reset()
            tokens = []
            for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
                tokens.append(int(token))
                if len(tokens) == count or token == model.token_eos():
                    break
            found[task][text] = tokens
    (work / "llama_tokens.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
