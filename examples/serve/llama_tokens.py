"""Greedy tokens of llama.cpp with LoRA adapters, in the environment that has it (``pip install llama-cpp-python``).

    VENV/bin/python examples/serve/llama_tokens.py ASKED.json ANSWERS.json

``ASKED.json`` holds ``model``, ``ids`` by prompt, ``length``, ``end``: the token that ends a text, and ``adapters``: files by
name, "" for the base model alone.
"""

import json
import sys
from pathlib import Path

import llama_cpp


def continued(
    model: llama_cpp.Llama, ids: list[int], length: int, end: int
) -> list[int]:
    """What most likely follows, up to the token that ends a text and with it."""
    found: list[int] = []
    model.reset()
    for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == length or token == end:
            return found


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    answers = {"version": llama_cpp.__version__, "tokens": {}}
    for name, file in asked["adapters"].items():
        model = llama_cpp.Llama(
            asked["model"],
            lora_path=file or None,
            n_ctx=256,
            n_threads=1,
            n_threads_batch=1,
            verbose=False,
        )
        answers["tokens"][name] = {
            text: continued(model, ids, asked["length"], asked["end"])
            for text, ids in asked["ids"].items()
        }
        model.close()
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
