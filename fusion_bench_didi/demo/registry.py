"""Telling the host's CLIP task pools what the classes of a task are called."""

import json
from pathlib import Path
from typing import Mapping, Sequence

from fusion_bench.tasks.clip_classification import CLIPTemplateFactory

from ..files import from_home


def verbatim(classname: str) -> str:
    """The template of tasks whose class names are tokens: nothing around them."""
    return classname


def register_tasks(tasks: Mapping[str, Sequence[str]]) -> None:
    """Register ``{task: class names}`` with the host, each name standing for itself.

    May be called any number of times. A task of another making that the host knows by
    the same name (``mnist``, say) is replaced, of which the host warns.
    """
    known = CLIPTemplateFactory.get_available_datasets()
    stored = CLIPTemplateFactory.get_classnames_and_templates
    for name, classnames in tasks.items():
        classnames, templates = list(classnames), [verbatim]
        there = stored(name) if name in known else ()
        if [*map(list, there)] == [classnames, templates]:
            continue
        # FusionBench 0.2.33 stores `templates=` under a misspelt key, so they have to
        # come in `dataset_info`, and asserts that the other two are given with it.
        CLIPTemplateFactory.register_dataset(
            name,
            dataset_info={"classnames": classnames, "templates": templates},
            classnames=classnames,
            templates=templates,
        )


def register_suite_tasks(path: str | Path) -> dict[str, list[str]]:
    """Register the tasks of a suite and return ``{task: class names}``.

    Args:
        path: a suite's folder, or the JSON file that describes one: ``suite.json`` or
            ``tasks.json``, with a ``classnames`` list for each task.
    """
    path = from_home(path)
    if path.is_dir():
        found = [path / name for name in ("suite.json", "tasks.json")]
        path = next((file for file in found if file.is_file()), found[0])
    described = json.loads(path.read_text(encoding="utf-8"))
    tasks = {
        name: list(facts["classnames"])
        for name, facts in described.get("tasks", described).items()
    }
    register_tasks(tasks)
    return tasks
