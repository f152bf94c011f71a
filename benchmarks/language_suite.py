"""SmolLM2-135M with experts of six kinds of text, methods side by side: from nothing to docs/comparison_language.{json,md}.

    python -m benchmarks.language_suite                # base model, texts, experts, comparison, examples, page
    python -m benchmarks.language_suite --models-only  # up to the experts; a killed run continues
    python -m benchmarks.language_suite --only pretrained individuals didi_010  # some rows

The base model is inside a package of the registry, texts are those of :mod:`benchmarks.language_texts`. An expert takes some two
minutes on one free core.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

from benchmarks import comparison_page
from benchmarks.language_texts import DOMAINS
from benchmarks.suites import write_json

PLACE = Path("outputs/language")
BUDGET, TOKENS, TOGETHER, TURNS = 0.1, 32, 8, 3


def examples(place: Path) -> dict:
    """A merge at :data:`BUDGET`, written and loaded again: what it generates as each task, and how fast mixed and plain."""
    import torch
    from fusion_bench.utils import instantiate
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    from fusion_bench_didi import DiDiMerging, DiDiModel

    pool = instantiate(OmegaConf.load("benchmarks/conf/modelpool/language.yaml"))
    begin = time.process_time()
    DiDiMerging(budget=BUDGET, output_dir=str(place), overwrite=True).run(pool)
    merging = time.process_time() - begin
    model = DiDiModel.from_pretrained(place).eval()
    tokenizer = AutoTokenizer.from_pretrained(pool.tokenizer)
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    base, found = pool.load_pretrained_model().eval(), {}
    for task, domain in DOMAINS.items():
        model.set_task(task)
        given = tokenizer(domain.prompt, return_tensors="pt")
        found[task] = {"prompt": domain.prompt}
        for who, one in (("base", base), ("merged", model)):
            with torch.inference_mode():
                ids = one.generate(**given, **options)[0]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            found[task][who] = text
    model.unset_task()
    tasks = [model.tasks[i % len(model.tasks)] for i in range(TOGETHER)]
    prompts = tokenizer([DOMAINS[t].prompt for t in tasks], return_tensors="pt", padding=True)  # fmt: skip
    options["min_new_tokens"] = TOKENS
    ways = {
        "plain": lambda: base.generate(**prompts, **options),
        "mixed": lambda: model.generate(**prompts, **options, task_ids=tasks),
    }
    seconds: dict[str, list[float]] = {how: [] for how in ways}
    with torch.inference_mode():
        for run in ways.values():
            run()
        for how in [*ways] * TURNS:
            begin = time.process_time()
            ways[how]()
            seconds[how].append(time.process_time() - begin)
    rates = {f"{h}_rate": TOGETHER * TOKENS / median(s) for h, s in seconds.items()}
    measured = {"merge_cpu_seconds": merging, **rates}
    measured["ratio"] = rates["mixed_rate"] / rates["plain_rate"]
    return {"examples": found, "measured": measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--place", type=Path, default=PLACE, help="where models, texts and rows are kept")  # fmt: skip
    parser.add_argument("--models-only", action="store_true")
    parser.add_argument("--only", nargs="*", help="keys of rows; those of the page if none is named")  # fmt: skip
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DIDI_LANGUAGE"] = str(arguments.place)
    from benchmarks.language_experts import make

    make(arguments.place / "models", arguments.place / "data", [*DOMAINS])
    if arguments.models_only:
        return
    changes = [f"only=[{','.join(arguments.only)}]"] if arguments.only else []
    comparison_page.run("language", arguments.place / "comparison", *changes)
    file = comparison_page.DOCS / "comparison_language.json"
    shown = examples(arguments.place / "merged")
    write_json(file, json.loads(file.read_text()) | shown)
    comparison_page.write_pages()


if __name__ == "__main__":
    main()
