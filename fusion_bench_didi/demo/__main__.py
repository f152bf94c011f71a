"""``python -m fusion_bench_didi.demo``: a few methods side by side on the embedded suite, and one table.

The same program, pools and methods as ``fusion_bench --config-name didi_compare``, with fewer rows.
"""

import logging
import tempfile
import warnings

from omegaconf import OmegaConf
from rich.console import Console

from ..programs.compare import ComparisonProgram
from .suite import build_suite

ENTRIES = {
    "base model": {"method": "pretrained", "group": "reference"},
    "individuals": {"method": "individuals", "group": "reference"},
    "weight average": {"method": "simple_average", "group": "static"},
    "DiDi-S": {"method": "didi/s", "group": "dynamic"},
    "DiDi-M": {"method": "didi/m", "group": "dynamic"},
    "DiDi-M, float32 factors": {
        "method": "didi/m",
        "overrides": {"factor_dtype": "float32"},
        "group": "dynamic",
    },
    "DiDi, smallest": {
        "method": "didi",
        "overrides": {"budget": 0.25},
        "group": "dynamic",
    },
}
POOLS = {
    "modelpool": {"_target_": "fusion_bench_didi.demo.pools.DemoCLIPVisionModelPool"},
    "taskpool": {
        "_target_": "fusion_bench_didi.demo.pools.DemoCLIPVisionModelTaskPool",
        "decode_once": True,
        "dataloader_kwargs": {"batch_size": 250},
    },
}


def main() -> None:
    """Make the suite if need be, merge it, print the table."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    build_suite()
    with tempfile.TemporaryDirectory() as directory:
        config = {"entries": ENTRIES, **POOLS, "path": {"log_dir": directory}}
        ComparisonProgram(**OmegaConf.create(config), seed=0, report=False).run()
    Console().print(
        "The same from the command line, and every other method:\n"
        "  fusion_bench method=didi modelpool=didi/demo taskpool=didi/demo\n"
        "  fusion_bench --config-name didi_compare",
        highlight=False,
    )


if __name__ == "__main__":
    main()
