"""The merges whose time and memory are compared: each writes its model of a pool to a directory.

The methods of host and package are imported when one runs, so that a table of names costs nothing.
"""

import sys
from collections.abc import Callable
from pathlib import Path

Merge = Callable[..., object]


def _didi(
    exact: bool = False,
    to_disk: bool = False,
    per_task: float | None = None,
    budget: float = 1.4,
    **settings,
) -> Merge:
    def run(pool, out: Path, **_):
        from fusion_bench_didi.lowrank import svd
        from fusion_bench_didi.method.didi import DiDiMerging

        if exact:
            svd.SKETCH_SIDE = sys.maxsize
        place = str(out) if to_disk else None
        x = per_task * len(pool.model_names) if per_task else budget
        model = DiDiMerging(budget=x, output_dir=place, **settings).run(pool)
        if not to_disk:
            model.save_pretrained(out)
        return model

    return run


def _tsv_m(pool, out: Path, **_):
    from fusion_bench.method import TaskSingularVectorMerging

    TaskSingularVectorMerging(alpha=1.0).run(pool).save_pretrained(out)


def _wudi(pool, out: Path, steps: int, **_):
    from fusion_bench.method.wudi import WUDIMerging

    WUDIMerging(iter_num=steps).run(pool).save_pretrained(out)


def _smile(pool, out: Path, device: str, **_):
    from fusion_bench.method import SmileUpscalingAlgorithm
    from safetensors.torch import save_file

    model = SmileUpscalingAlgorithm(
        device=device, upscaling_accelerator=device, gate_k=16, k=128
    ).run(pool)
    out.mkdir()
    # its factors are views of whole decompositions, which would be written too
    own = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    save_file(own, str(out / "model.safetensors"))


def _emr(pool, out: Path, **_):
    from fusion_bench_didi.method.baselines.emr import EMRMerging

    EMRMerging().run(pool).save_pretrained(out)


METHODS: dict[str, tuple[str, Merge]] = {
    "didi": ("DiDi-M", _didi()),
    "didi_disk": (
        "DiDi-M, written while merging",
        _didi(to_disk=True, factor_memory_gb=0.1),
    ),
    "didi_exact": ("DiDi-M, exact decompositions", _didi(exact=True)),
    "didi_per_task": ("DiDi, 0.175 per task", _didi(per_task=1.4 / 8)),
    "didi_float": ("DiDi-M, float factors", _didi(factor_dtype="checkpoint")),
    "didi_float_exact": (
        "DiDi-M, float factors, exact decompositions",
        _didi(factor_dtype="checkpoint", exact=True),
    ),
    "tsv_m": ("TSV-M", _tsv_m),
    "emr": ("EMR", _emr),
    "smile": ("SMILE (16, 128)", _smile),
    "wudi": ("WUDI, 300 steps", _wudi),
}
#: measured side by side; the others are about growth and about budgets
PEERS = tuple(name for name in METHODS if name != "didi_per_task")
BUDGETS = (0.06, 0.12, 0.24, 0.5, 0.7, 1.0)
METHODS |= {f"didi_{x}": (f"DiDi at {x}", _didi(budget=x)) for x in BUDGETS}
AT_BUDGETS = (*(f"didi_{x}" for x in BUDGETS), "didi", "tsv_m")
