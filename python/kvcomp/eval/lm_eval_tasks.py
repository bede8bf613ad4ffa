"""The generated tasks as files that the LM Evaluation Harness reads as local tasks, without a network."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from .tasks import FAMILIES, MODES, TASKS_VERSION, Question, Task, iter_tasks, score

_METRIC = "score"
# Written beside the tasks: the harness looks functions up in files next to the YAML that names them.
_FUNCTIONS = '''"""Scoring of the tasks beside this file."""

from kvcomp.eval.lm_eval_tasks import process_results

__all__ = ["process_results"]
'''


def export_lm_eval(
    directory: str | os.PathLike[str],
    *,
    length: int,
    count: int,
    seed: int = 0,
    families: Sequence[str] = FAMILIES,
    modes: Sequence[str] = MODES,
    questions: int = 4,
) -> list[str]:
    """Write the evaluation set of :func:`kvcomp.eval.tasks.iter_tasks` as tasks for ``lm_eval --include_path``.

    There is one task ``kvcomp_<family>_<mode>_<length>`` for each family and mode, and the group ``kvcomp_<length>``
    of them all. A document is one question; its fields ``context`` and ``prompt`` say where the context ends, which a
    model that compresses can read from ``request.doc`` to honour the mode (the harness itself joins the two).

    Args:
        directory: a folder that does not exist yet, or is empty. It appears complete or not at all. The YAML files
            name their data by absolute path, so the folder must stay where it is.
        length: bytes of each task.
        count: tasks (contexts) for each family and mode; with ``seed``, ``families``, ``modes`` and ``questions`` as
            in :func:`~kvcomp.eval.tasks.iter_tasks`.

    Returns:
        The names of the tasks.

    Raises:
        ValueError: the folder holds something, or an argument of the tasks is out of range.
        OSError: the files cannot be written.
    """
    target = Path(directory).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"export_lm_eval: directory: expected a new or empty folder, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        folder = Path(beside) / "tasks"
        folder.mkdir()
        names = []
        for family in families:
            for mode in modes:
                asked = [
                    (task, question)
                    for task in iter_tasks(
                        length=length, count=count, seed=seed, families=[family], modes=[mode], questions=questions
                    )
                    for question in task.questions
                ]
                name = f"kvcomp_{family}_{mode}_{length}"
                names.append(name)
                lines = "".join(json.dumps(_document(task, question)) + "\n" for task, question in asked)
                (folder / f"{name}.jsonl").write_text(lines, "ascii")
                new_tokens = max(len(question.target) for _, question in asked)
                (folder / f"{name}.yaml").write_text(_task_yaml(name, target / f"{name}.jsonl", new_tokens), "utf-8")
        group = {
            "group": f"kvcomp_{length}",
            "task": names,
            "aggregate_metric_list": [{"metric": _METRIC, "aggregation": "mean", "weight_by_size": False}],
            "metadata": {"version": TASKS_VERSION},
        }
        (folder / f"_kvcomp_{length}.yaml").write_text(yaml.safe_dump(group, sort_keys=False), "utf-8")
        (folder / "functions.py").write_text(_FUNCTIONS, "utf-8")
        os.replace(folder, target)
    return names


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's hook: a document of :func:`export_lm_eval` and the text generated for it, to its score."""
    question = Question(
        document["prompt"], tuple(document["answers"]), document["target"], ordered=bool(document["ordered"])
    )
    return {_METRIC: score(results[0], question)}


def _document(task: Task, question: Question) -> dict[str, Any]:
    return {"context": task.context, "seed": task.seed, **asdict(question)}


def _task_yaml(name: str, data: Path, new_tokens: int) -> str:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{context}}{{prompt}}",
        "doc_to_target": "{{target}}",
        "num_fewshot": 0,
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": new_tokens},
        "metric_list": [{"metric": _METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": TASKS_VERSION},
    }
    # The harness's own tag, which a plain YAML writer does not know.
    return yaml.safe_dump(task, sort_keys=False) + "process_results: !function functions.process_results\n"
