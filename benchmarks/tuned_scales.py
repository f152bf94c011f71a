"""Scales of static merges as chosen on the validation images of real8: the rows called *tuned* of ``didi_compare``.

    python -m benchmarks.tuned_scales

Average accuracy on validation per scale; nothing is looked at on test. Writes docs/tuned_scales.json, whose best scales
``config/didi_compare.yaml`` holds (a test compares them).
"""

from pathlib import Path

from fusion_bench.constants import PROJECT_ROOT_PATH
from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks.suites import Suite, machine, mean, write_json

FILE = Path("docs") / "tuned_scales.json"
SCALES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
#: Entries of the comparison, and which of their settings is the scale.
ENTRIES = {
    "task_arithmetic": "scaling_factor",
    "ties": "scaling_factor",
    "tsv_m": "alpha",
    "iso_c": "scaling_factor",
}


def method_of(key: str, scale: float):
    """The host's method as the comparison runs it, at another scale."""
    entry = OmegaConf.load(Path("config") / "didi_compare.yaml").entries[key]
    place = PROJECT_ROOT_PATH / "fusion_bench_config"
    settings = OmegaConf.load(place / "method" / f"{entry.method}.yaml")
    return instantiate(
        OmegaConf.merge(settings, entry.overrides, {ENTRIES[key]: scale})
    )


def main() -> None:
    suite, found = Suite(None, split="validation"), {}
    for key in ENTRIES:
        found[key] = {}
        for scale in SCALES:
            model = method_of(key, scale).run(suite.modelpool)
            found[key][str(scale)] = mean(suite.accuracy(model))
            print(key, scale, found[key][str(scale)], flush=True)
    best = {key: float(max(row, key=row.get)) for key, row in found.items()}
    write_json(FILE, {"machine": machine(), "accuracy": found, "best": best})


if __name__ == "__main__":
    main()
