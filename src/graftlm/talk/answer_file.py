"""Answer a file of prompts: batched, resumable, in order.

Owns the answers file: a row belongs to the prompts file's line it names, finished rows are never asked again, and
a half-written last row is written anew. Does not know how answers are made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.run import ProgressShown, disk_errors, say
from graftlm.talk.generate import BATCH_ROWS, Answer, Chatbot, Prompt, load_chatbot
from graftlm.talk.prompts import FORMS, PromptRow, no_folder, read_prompts
from graftlm.talk.sampling import Sampling

# Rows answered between two writes: what a kill can cost. Longer windows batch better by length.
WINDOW_ROWS = 4 * BATCH_ROWS
BAD_ROWS_TOLD = 10


def generate_file(
    model: Chatbot | str | Path, input_file: str | Path, output_file: str | Path, sampling: Sampling
) -> dict[str, Any]:
    """Answer every row of `input_file` (JSONL) into `output_file`; rows already there are kept.

    Each answer row holds the prompt's row and line, the answer, token counts, model and settings. Returns JSON-ready
    counts: `rows`, `seconds`, `tokens` of this call, `rows_before`, `bad_rows`. A row that cannot be asked is told
    by file:line and left out. Raises UserError, DiskError.
    """
    started = time.monotonic()
    source, target = Path(input_file), Path(output_file)
    name = str(model) if isinstance(model, (str, Path)) else "in memory"
    rows = list(read_prompts(source))
    if target.exists() and (target.is_dir() or target.samefile(source)):
        raise UserError(f"{target} cannot take the answers: it is the prompts or a folder.", "Give another --output.")
    if not rows:
        raise UserError(f"{source} holds no rows.", f"Write one prompt a line: {FORMS}.")
    if not target.parent.is_dir():
        raise no_folder(target.parent)
    made_by = {"model": name, "settings": asdict(sampling)}
    with disk_errors(target.parent):
        done = _answered(target, {row.line: row for row in rows}, made_by)
    asked = [row for row in rows if row.line not in done]
    readable = [row for row in asked if row.conversation is not None]
    bad = [f"{source}:{row.line} {row.problem}" for row in asked if row.conversation is None]
    tokens = num_answered = 0
    if readable:
        chatbot = model if isinstance(model, Chatbot) else load_chatbot(model)
        with (
            disk_errors(target.parent),
            target.open("a", encoding="utf-8") as stream,
            ProgressShown("answers", len(readable)) as shown,
        ):
            for row, answer in _answer_rows(chatbot, readable, sampling, bad, shown.reach):
                if answer is not None:
                    stream.write(json.dumps(_answer_row(row, answer) | made_by, ensure_ascii=False) + "\n")
                    stream.flush()
                    tokens += answer.answer_tokens
                    num_answered += 1
    _tell_bad(bad)
    if bad and not num_answered and not done:
        raise UserError(f"None of the {len(bad)} rows of {source} can be asked.", f"Write one prompt a line: {FORMS}.")
    return {
        "rows": num_answered,
        "seconds": round(time.monotonic() - started, 3),
        "tokens": tokens,
        "rows_before": len(done),
        "bad_rows": len(bad),
    }


def _answer_rows(
    chatbot: Chatbot, rows: list[PromptRow], sampling: Sampling, bad: list[str], reach: Callable[[int], None]
) -> Iterator[tuple[PromptRow, Answer | None]]:
    """Rows and answers in order; a row that does not fit has none and is added to `bad`.

    `reach` is told how many are done whenever an answer ends, long before a window of rows is written.
    """
    for start in range(0, len(rows), WINDOW_ROWS):
        window = rows[start : start + WINDOW_ROWS]
        prompts: dict[int, Prompt] = {}
        for row in window:
            assert row.conversation is not None
            try:
                prompts[row.line] = chatbot.prompt(row.conversation, sampling)
            except UserError as error:
                bad.append(f"{row.conversation.source} {error.problem}")
        num_behind = start + len(window) - len(prompts)
        answered = chatbot.answer_prompts(
            list(prompts.values()), sampling, lambda count, num_behind=num_behind: reach(num_behind + count)
        )
        answers = dict(zip(prompts, answered, strict=True))
        reach(start + len(window))
        for row in window:
            yield row, answers.get(row.line)


def _answer_row(row: PromptRow, answer: Answer) -> dict[str, Any]:
    return {
        "line": row.line,
        "prompt": row.value,
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "num_dropped_messages": answer.num_dropped_messages,
        "ending": answer.ending,
    }


def _answered(target: Path, rows: dict[int, PromptRow], made_by: Mapping[str, Any]) -> set[int]:
    """Lines already answered in `target`; a half-written last row is cut off.

    Raises UserError on foreign rows: of other prompts, or not `made_by` the same model with the same settings.
    """
    if not target.exists():
        return set()
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines: set[int] = set()
    for number, raw in enumerate(whole.splitlines(), start=1):
        row = _parsed(raw)
        prompt = rows.get(row.get("line", 0)) if isinstance(row, dict) else None
        if prompt is None or row.get("prompt") != prompt.value:
            raise UserError(
                f"{target}:{number} is not an answer to a row of this prompts file.",
                "Give another --output, or delete it to begin anew.",
            )
        different = _difference(row, made_by)
        if different:
            raise UserError(
                f"{target}:{number} was answered {different}.",
                "Give another --output, or delete it to begin anew.",
            )
        lines.add(row["line"])
    if len(whole) < len(content):
        os.truncate(target, len(whole))
    return lines


def _is_same_model(one: Any, other: str) -> bool:
    """Whether two paths or names are of one model, however a path is spelled."""
    return one == other or (
        isinstance(one, str) and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
    )


def _difference(row: Mapping[str, Any], made_by: Mapping[str, Any]) -> str:
    """By what an answered row was made otherwise, in words; empty where by nothing."""
    if not _is_same_model(row.get("model"), made_by["model"]):
        return f"by {row.get('model')}, not by {made_by['model']}"
    had, wanted = row.get("settings"), made_by["settings"]
    if not isinstance(had, dict):
        return "with settings it does not tell"
    others = [key for key in wanted if had.get(key) != wanted[key]]
    flags = [f"--{key.replace('_', '-')} {had.get(key)}, not {wanted[key]}" for key in others]
    return f"with {'; '.join(flags)}" if flags else ""


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _tell_bad(bad: list[str]) -> None:
    for problem in bad[:BAD_ROWS_TOLD]:
        say(f"left out: {problem}")
    if len(bad) > BAD_ROWS_TOLD:
        say(f"left out: {len(bad) - BAD_ROWS_TOLD} more rows")
