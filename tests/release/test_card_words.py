"""The Chinese half of a card says in Chinese whatever the rooms below may record in English."""

import ast
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import graftlm
from graftlm.health.rates import RateCuts
from graftlm.recipe import Data
from graftlm.recipe import Tokenizer as Section
from graftlm.release.card_words import TOO_LONG, in_chinese
from graftlm.text import shelf
from graftlm.text.tokenizer import graft

TEXT = Path(graftlm.__file__).parent / "text"
# Calls that give a row's reason, and at which place of theirs it stands.
REASONS = {"Unusable": 0, "BrokenText": 0, "add": 0, "Row": 2, "_object": 1}


def spoken(node: ast.AST) -> list[str]:
    """The sentences an expression may be, with 7 for what changes; none where it is told elsewhere."""
    match node:
        case ast.Constant(value=str(text)) if text:
            return [text]
        case ast.JoinedStr(values=parts):
            # One reason of `fit.py` stands inside another.
            return ["".join("longer than 7 tokens" if "_longer" in ast.dump(part) else said(part) for part in parts)]
        case ast.IfExp(body=body, orelse=other):
            return spoken(body) + spoken(other)
    return []


def said(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "7"


def reasons_of(file: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse((TEXT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in REASONS and len(node.args) > REASONS[name]:
                found += spoken(node.args[REASONS[name]])
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", "") == "problem":
            found += spoken(node.value)
        elif isinstance(node, ast.Return) and node.value is not None and file in ("fit.py", "json_rows.py"):
            found += [text for text in spoken(node.value) if " " in text]
    return found


@pytest.mark.parametrize(
    ("file", "at_least"),
    [("readers.py", 19), ("corpus.py", 1), ("fit.py", 3), ("clean.py", 2), ("files.py", 2),
     ("json_rows.py", 4), ("counting.py", 1)],
)  # fmt: skip
def test_every_reason_for_leaving_a_row_out_has_chinese_words(file: str, at_least: int) -> None:
    reasons = reasons_of(file)
    assert len(reasons) >= at_least
    assert [reason for reason in reasons if "原文" in in_chinese(reason)] == []


def test_what_becomes_of_a_dialogue_on_the_shelf_has_chinese_words() -> None:
    assert len(shelf.REASONS) == 4
    assert [reason for reason in shelf.REASONS.values() if "原文" in in_chinese(reason)] == []


def test_every_note_of_a_graft_has_chinese_words() -> None:
    values: dict[str, Any] = {field.name: 3 for field in fields(graft.GraftReport)}
    half = SimpleNamespace(expansions={5: ()}, token_bytes=lambda _: b"\xe4")
    asked, notes = Section(mode="continued", num_pieces=1234, text=("a.txt",)), []
    for mode, dropped in (("card", {}), ("continued", {}), ("continued", {"too long": 2}), ("merge", {})):
        told = {"mode": mode, "dropped": dropped, "script": ["Han"], "chars_per_token": {}, "notes": notes}
        graft._add_notes(graft.GraftReport(**values | told), asked, half)  # type: ignore[arg-type]
    assert len(set(notes)) == 6
    assert [note for note in notes if "原文" in in_chinese(note)] == []
    assert in_chinese(notes[1]).startswith("没有给出")


def test_what_is_not_known_is_quoted_and_a_rollback_keeps_its_numbers() -> None:
    assert in_chinese("a new word") == "“a new word”（运行记录原文）"
    told = in_chinese(
        "Step 31: the loss rose. Rolled back to step 20; the learning rate is 0.3 of the recipe's from there on."
    )
    assert told == "第 31 步：“the loss rose.” 已回退到第 20 步，此后学习率为配方的 0.3 倍。"
    for cuts in (RateCuts(), RateCuts(0.3, {"adapter": 0.3})):
        cut = cuts.cut(["new_rows", "adapter"], 1e-4, {"new_rows": 1e-3, "adapter": 1e-3})
        told = in_chinese(f"Step 31: the loss rose. Rolled back to step 20; {cut.told()}.")
        assert "原文" not in told
        assert "the new rows to 0." in told
    assert set(TOO_LONG) == set(Data.model_fields["too_long"].annotation.__args__)  # type: ignore[union-attr]
