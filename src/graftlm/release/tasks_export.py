"""Our files of questions as tasks of lm-evaluation-harness: a YAML and a JSONL file each.

Owns that form, which any of its backends reads with `--include_path`. Does not import lm-eval and does not run it.
Source: its task guide (docs/task_guide.md of version 0.4): local JSON through `dataset_path: json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from graftlm.errors import UserError
from graftlm.release.tasks import Task
from graftlm.run import disk_errors, say


def export_tasks(read: Mapping[str, Any], out: Path) -> list[str]:
    """Write every task among the files of `--data` into the folder `out`; returns the tasks' names.

    Raises UserError where there is none, or `out` holds something already; DiskError.
    """
    tasks = {_name_of(name): task for name, task in read.items() if isinstance(task, Task)}
    if not tasks:
        raise UserError(
            "No file of --data holds questions: there is no task to export.",
            'Give a file of {"question", "answer"} or {"question", "choices", "index"} rows.',
        )
    if len(tasks) < sum(isinstance(task, Task) for task in read.values()):
        raise UserError("Two files of questions have the same name.", "Rename one: a task is called by its file.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already holds something.", "Give --export-lm-eval a new or empty folder.")
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, task in tasks.items():
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(task))
            (out / f"{name}.jsonl").write_text(rows, encoding="utf-8")
            settings = yaml.safe_dump(_settings(name, task, out), sort_keys=False, allow_unicode=True)
            (out / f"{name}.yaml").write_text(settings, encoding="utf-8")
    say(f"lm-eval: --include_path {out} --tasks {','.join(tasks)} --apply_chat_template")
    return list(tasks)


def _name_of(file: str) -> str:
    return "graftlm_" + re.sub(r"\W+", "_", Path(file).stem)


def _rows(task: Task) -> list[dict[str, Any]]:
    if task.has_choices:
        return [{"question": q.question, "choices": list(q.choices), "index": q.index} for q in task.questions]
    return [{"question": q.question, "answer": q.answer} for q in task.questions]


def _settings(name: str, task: Task, out: Path) -> dict[str, Any]:
    """One task's YAML. The question is the whole prompt: the model's own chat template puts its frame around it."""
    settings: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((out / f"{name}.jsonl").resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    if task.has_choices:
        metrics = [{"metric": kind, "aggregation": "mean", "higher_is_better": True} for kind in ("acc", "acc_norm")]
        return settings | {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{index}}",
            "metric_list": metrics,
            "metadata": {"version": 1},
        }
    strip = {"function": "regex", "regex_pattern": r"(?s)^\s*(.*?)\s*$"}
    return settings | {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [{"name": "stripped", "filter": [strip, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
