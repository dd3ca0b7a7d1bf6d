"""Several models on the same files: figures of each, paired differences against the first, answers side by side.

Owns what is compared and that it is compared on the same rows. Does not know how it is shown (`compare_page`), how a
judge is asked (`compare_judge`), or why the models are what they are (`sweep`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graftlm.errors import UserError
from graftlm.release.compare_judge import Judge, Judged, judge_answers, key_refused
from graftlm.release.evaluate import Candidate, Data, Dialogues, Measured, Scores, measure, pick_questions, read_data
from graftlm.release.intervals import difference_interval
from graftlm.release.tasks import TaskResult
from graftlm.run import progress, say
from graftlm.text.dialogue import Conversation


@dataclass(slots=True)
class Comparison:
    """What came of it, by model and file. The first model is the one the others are held against.

    `samples` holds, for each question picked, the file, what was asked, the right answer, every model's answer, and
    where there is a judge its verdict on each but the first: win, loss, tie, or none where it could not be judged.
    """

    facts: dict[str, dict[str, Any]]
    results: dict[str, dict[str, dict[str, Any]]]
    samples: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    scores: dict[str, dict[str, Scores]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The models, in order."""
        return list(self.results)

    @property
    def files(self) -> list[str]:
        """The files, in order."""
        return list(next(iter(self.results.values())))


def compare_models(
    models: Mapping[str, str],
    files: Sequence[str],
    num_questions: int = 8,
    max_answer_tokens: int = 128,
) -> Comparison:
    """Compare models (paths or hub ids by name) on files. One is in memory at a time.

    Raises UserError for a model folder that is broken, a file of no use.
    """
    if len(models) < 2:
        raise UserError(f"{len(models)} model is no comparison.", "Give two or more; graftlm eval judges one.")
    read = read_data(files)
    # All are opened, no weight read, before any is measured: a broken one is told at once.
    candidates = {name: Candidate(path) for name, path in models.items()}
    measured: dict[str, dict[str, Measured]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in progress(candidates, len(candidates), "models"):
        candidate = candidates[name]
        say(f"compare: {name}")
        measured[name] = measure(candidate, read, num_questions, max_answer_tokens)
        facts[name] = {
            "parameters": candidate.num_parameters,
            "pieces": candidate.tokenizer.num_pieces,
            "context_tokens": candidate.model.config.max_position_embeddings,
            "template": candidate.template.fingerprint[:8],
        }
        candidate.release()
    results = {name: {file: dict(one.told) for file, one in by_file.items()} for name, by_file in measured.items()}
    first = next(iter(models))
    for name in list(models)[1:]:
        for file in read:
            difference = _difference(measured[name][file].scores, measured[first][file].scores)
            results[name][file]["difference"] = {"against": first, **difference}
    scores = {
        name: {file: one.scores for file, one in by_file.items() if isinstance(one.scores, Scores)}
        for name, by_file in measured.items()
    }
    return Comparison(facts, results, _samples(read, measured, num_questions), _notes(facts, results), scores)


def _difference(one: Scores | TaskResult, other: Scores | TaskResult) -> dict[str, Any]:
    """One model's figures less another's, on what both could be judged by, with 95 % intervals."""
    if isinstance(one, Scores) and isinstance(other, Scores):
        both = one.is_whole_D & other.is_whole_D
        if not both.any():
            return {"num_dialogues": 0, "bits_per_byte": None, "interval": None}
        bits, other_bits = one.nats_D[both] / math.log(2), other.nats_D[both] / math.log(2)
        num_bytes, other_bytes = one.num_bytes_D[both], other.num_bytes_D[both]
        return {
            "num_dialogues": int(both.sum()),
            "bits_per_byte": float(bits.sum() / max(num_bytes.sum(), 1) - other_bits.sum() / max(other_bytes.sum(), 1)),
            "interval": difference_interval(bits, num_bytes, other_bits, other_bytes),
        }
    assert isinstance(one, TaskResult)
    assert isinstance(other, TaskResult)
    both = one.is_asked & other.is_asked
    found: dict[str, Any] = {"num_questions": int(both.sum())}
    ones = np.ones(int(both.sum()))
    for name, is_right in one.rights.items():
        rights, other_rights = is_right[both].astype(float), other.rights[name][both].astype(float)
        found[name] = float(rights.mean() - other_rights.mean()) if len(ones) else None
        found[f"{name}_interval"] = difference_interval(rights, ones, other_rights, ones) if len(ones) else None
    return found


def _samples(
    read: Mapping[str, Data], measured: Mapping[str, Mapping[str, Measured]], num_questions: int
) -> list[dict[str, Any]]:
    samples = []
    for file, data in read.items():
        if not isinstance(data, Dialogues):
            continue
        for place, asked in enumerate(pick_questions(data.conversations, num_questions)):
            samples.append({
                "file": file,
                "prompt": _prompt(asked),
                "reference": asked.messages[-1].content,
                "answers": {name: by_file[file].answers[place] for name, by_file in measured.items()},
            })  # fmt: skip
    return samples


def _prompt(conversation: Conversation) -> list[dict[str, str]]:
    return [
        {"role": message.role, "content": "\n".join(filter(None, (message.content, message.input)))}
        for message in conversation.messages[:-1]
    ]


def _notes(facts: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to know before figures are compared."""
    notes = []
    if len({one["template"] for one in facts.values()}) > 1:
        notes.append(
            "The models have different chat templates. Each is asked in its own, so a difference is one of model and "
            "template together."
        )
    if len({one["pieces"] for one in facts.values()}) > 1:
        notes.append("The models have different tokenizers: losses per token do not compare, bits per byte do.")
    for name, by_file in results.items():
        for file, told in by_file.items():
            if told.get("num_left_out"):
                notes.append(
                    f"{name} could not be judged by {told['num_left_out']:,} rows of {file}: they are longer than its "
                    "context, or its template refuses them. Differences count what both models could read."
                )
    return notes


def judge_comparison(found: Comparison, judge: Judge) -> None:
    """Verdicts on every answer against the first model's, into the samples and, counted, into the results.

    Raises UserError when the judge refuses the key, with what it had judged by then in `found`.
    """
    first = found.names[0]
    for name in found.names[1:]:
        judged = judge_answers(judge, found.samples, name, first)
        for note in _notes_on_judging(name, judged):
            found.notes.append(note)
            say(note)
        for sample, verdict in zip(found.samples, judged.verdicts, strict=True):
            sample.setdefault("verdicts", {})[name] = verdict
        for file in {sample["file"] for sample in found.samples}:
            pairs = zip(found.samples, judged.verdicts, strict=True)
            own = [verdict for sample, verdict in pairs if sample["file"] == file]
            found.results[name][file]["judged"] = {
                "against": first,
                "judge": judge.model,
                "wins": own.count("win"),
                "losses": own.count("loss"),
                "ties": own.count("tie"),
                "not_judged": own.count(None),
            }
        if judged.is_key_refused:
            raise key_refused(judge, judged.problem)


def _notes_on_judging(name: str, judged: Judged) -> list[str]:
    notes = []
    if judged.num_unreadable:
        notes.append(
            f"Of {judged.num_unreadable:,} of {len(judged.verdicts):,} pairs of {name} the judge's last line was none "
            "of 1, 2 and tie: they are not judged."
        )
    if judged.num_refused:
        notes.append(
            f"The judge would not take {judged.num_refused:,} of {len(judged.verdicts):,} pairs of {name}, which are "
            f"not judged. Of the first: {judged.refusal}."
        )
    if judged.problem:
        notes.append(
            f"The judge was given up on {name}: {judged.problem}. What it had not judged by then counts as none."
        )
    return notes
