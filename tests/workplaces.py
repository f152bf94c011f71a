"""The host's command as a user runs it: models, data and a configuration of stock pools on disk."""

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
from helpers import pictures, write_clip
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from tiny_clip import TinyClip

TASKS = ("mnist", "svhn", "eurosat")


def fusion_bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    script = Path(sysconfig.get_path("scripts")) / "fusion_bench"
    out = cwd / "out"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [
            str(script),
            f"--config-dir={cwd / 'conf'}",
            f"hydra.run.dir={out}",
            f"path.log_dir={out}",
            "print_config=false",
            *arguments,
        ],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def write_workplace(root: Path, tiny_clip: "TinyClip") -> Path:
    """Models, data and a configuration of stock pools, as a user would have them."""
    clip = write_clip(root / "clip", tiny_clip.base)
    models = tiny_clip.save(root / "models")
    data = {}
    for seed, task in enumerate(TASKS):
        rows = pictures(seed)
        columns = {key: [row[key] for row in rows] for key in ("image", "label")}
        features = datasets.Features(
            image=datasets.Image(), label=datasets.Value("int64")
        )
        folder = root / "data" / task
        folder.mkdir(parents=True)
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / "test-00000-of-00001.parquet")
        data[task] = {
            "_target_": "datasets.load_dataset",
            "path": str(folder),
            "split": "test",
        }
    pool = {
        "defaults": [{"CLIPVisionModelPool@": "_template"}],
        "models": {name: str(models / name) for name in ("_pretrained_", *TASKS)},
        "processor": str(clip),
    }
    tasks = {
        "defaults": [{"CLIPVisionModelTaskPool@": "_template"}],
        "base_model": str(clip),
        "test_datasets": data,
        "dataloader_kwargs": {
            "batch_size": 6,
            "num_workers": 0,
            "pin_memory": False,
        },
    }
    for group, content in (("modelpool", pool), ("taskpool", tasks)):
        (root / "conf" / group).mkdir(parents=True)
        OmegaConf.save(content, root / "conf" / group / "tiny.yaml")
    return root
