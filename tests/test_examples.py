"""The shipped data: what its generator writes, enough of it, right, readable, and its held-out questions kept apart."""

import datetime
import json
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from graftlm.text.corpus import read_conversations

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = EXAMPLES / "data"
TRAIN = ("dialogues.train.jsonl", "handwritten.train.jsonl")
HELDOUT = ("dialogues.heldout.jsonl",)
DIALOGUES = TRAIN + HELDOUT
ENGLISH = ("english_dialogues.jsonl", "english_dialogues.heldout.jsonl")
POLITE = re.compile("^(请问，|我想知道，|考考你：|请你|麻烦你)")
WEEKDAYS = "一二三四五六日"
DAYS_LATER = {"前天": -2, "昨天": -1, "明天": 1, "后天": 2, "大后天": 3}
MONTHS = [f"{number}月" for number in ("一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二")]
ZODIAC_FROM_YEAR_4 = "鼠牛虎兔龙蛇马羊猴鸡狗猪"
# everything in one smallest unit of its dimension
SIZES = {
    "毫米": 1, "厘米": 10, "分米": 100, "米": 1000, "千米": 10**6, "公里": 10**6,
    "克": 1, "两": 50, "斤": 500, "千克": 1000, "公斤": 1000, "吨": 10**6,
    "毫升": 1, "升": 1000,
    "秒": 1, "分钟": 60, "刻钟": 900, "小时": 3600, "天": 86400, "星期": 604800,
    "个月": 1, "个季度": 3, "年": 12, "个世纪": 1200,
    "分": 1, "角": 10, "元": 100,
    "平方分米": 1, "平方米": 100, "公顷": 10**6,
}  # fmt: skip


def rows(*names: str) -> list[dict]:
    return [json.loads(line) for name in names for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def turns(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"]]


def of_kind(kind: str) -> list[list[str]]:
    found = [turns(row) for row in rows(*DIALOGUES) if row["kind"] == kind]
    assert len(found) > 50
    return found


def asked(questions: list[str]) -> tuple[str, ...]:
    """A prompt apart from how politely its last question is put."""
    return (*questions[:-1], POLITE.sub("", questions[-1]))


def test_the_generator_writes_the_same_bytes() -> None:
    found = subprocess.run([sys.executable, str(EXAMPLES / "make_data.py"), "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_there_are_enough_dialogues_of_many_kinds() -> None:
    train, heldout = rows(*TRAIN), rows(*HELDOUT)
    assert len(train) >= 1500
    learnable = {row["kind"] for row in heldout if row.get("learnable", True)}
    assert len(learnable) >= 20
    assert learnable <= {row["kind"] for row in train}
    assert any(len(row["messages"]) > 2 and row.get("learnable", True) for row in heldout)


def test_three_hundred_dialogues_are_written_by_hand() -> None:
    written = [
        turns(row) for path in (DATA / "handwritten").glob("*.jsonl") for row in rows(f"handwritten/{path.name}")
    ]
    assert len(written) >= 300
    assert sum(len(said) > 2 for said in written) >= 80
    shipped = [turns(row) for row in rows(*DIALOGUES) if row["kind"] == "handwritten"]
    assert sorted(shipped) == sorted(written)


@pytest.mark.parametrize(("name", "least"), [("chinese.txt", 40), ("english.txt", 60), ("english.heldout.txt", 10)])
def test_prose_is_written_by_hand_too(name: str, least: int) -> None:
    paragraphs = (DATA / "handwritten" / name).read_text(encoding="utf-8").splitlines()
    assert len(set(paragraphs)) == len(paragraphs) >= least
    shipped = set((DATA / name).read_text(encoding="utf-8").splitlines())
    assert set(paragraphs) <= shipped


def test_kinds_json_counts_the_rows() -> None:
    told = json.loads((DATA / "kinds.json").read_text(encoding="utf-8"))
    train, heldout = (Counter(row["kind"] for row in rows(*names)) for names in (TRAIN, HELDOUT))
    assert {kind: (one["num_train"], one["num_heldout"]) for kind, one in told.items()} == {
        kind: (train[kind], heldout[kind]) for kind in train | heldout
    }
    beyond = {row["kind"] for row in rows(*HELDOUT) if not row.get("learnable", True)}
    assert beyond == {kind for kind, one in told.items() if not one["learnable"]}


@pytest.mark.parametrize(("learned", "kept_back"), [(TRAIN, HELDOUT), (ENGLISH[:1], ENGLISH[1:])])
def test_no_heldout_question_is_asked_anywhere_in_training(learned: tuple[str], kept_back: tuple[str]) -> None:
    train, heldout = rows(*learned), rows(*kept_back)
    seen = {asked(turns(row)[:end]) for row in train for end in range(1, len(row["messages"]), 2)}
    assert not [row["id"] for row in heldout if asked(turns(row)[:-1]) in seen]


def test_heldout_text_is_in_no_text_that_is_learned_from() -> None:
    heldout = set((DATA / "english.heldout.txt").read_text(encoding="utf-8").splitlines())
    assert not heldout & set((DATA / "english.txt").read_text(encoding="utf-8").splitlines())
    chinese = (DATA / "chinese.txt").read_text(encoding="utf-8")
    assert not [row["id"] for row in rows(*HELDOUT) if "".join(turns(row)) in chinese.splitlines()]


@pytest.mark.parametrize("name", [*DIALOGUES, *ENGLISH])
def test_every_row_is_clean_and_read_by_the_reader(name: str) -> None:
    found = rows(name)
    assert len({row["id"] for row in found}) == len(found)
    assert len({tuple(turns(row)) for row in found}) == len(found)
    for row in found:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert all(said == said.strip() and said for said in turns(row)), row["id"]
    conversations, dropped = read_conversations(str(DATA / name))
    assert len(conversations) == len(found)
    assert not dropped.counts
    assert [[message.content for message in c.messages] for c in conversations] == [turns(row) for row in found]


def test_all_text_is_plain_utf8() -> None:
    for path in [path for path in DATA.rglob("*") if path.is_file()]:
        text = path.read_bytes().decode("utf-8")
        assert "\ufffd" not in text
        assert not text.startswith("\ufeff")
        assert "\r" not in text
        assert unicodedata.normalize("NFC", text) == text, path.name


def test_a_question_has_one_answer() -> None:
    answers: dict[tuple[str, ...], set[str]] = {}
    for row in rows(*DIALOGUES):
        answers.setdefault(asked(turns(row)[:-1]), set()).add(turns(row)[-1])
    assert not {question: found for question, found in answers.items() if len(found) > 1}


@pytest.mark.parametrize("kind", ["arithmetic", "arithmetic_large", "followup_arithmetic"])
def test_sums_are_right(kind: str) -> None:
    for said in of_kind(kind):
        numbers = []
        for answer in said[1::2]:
            a, sign, b, result = re.fullmatch(r"(\d+)([加减乘])(\d+)等于(\d+)。", answer).groups()
            numbers.append((a, b, result))
            assert int(result) == {"加": int(a) + int(b), "减": int(a) - int(b), "乘": int(a) * int(b)}[sign], said
        assert re.findall(r"\d+", said[0]) == list(numbers[0][:2])
        if len(said) > 2:
            assert numbers[1][0] == numbers[0][2]
            assert re.findall(r"\d+", said[2]) == [numbers[1][1]]


def test_comparisons_and_successors_are_right() -> None:
    for question, answer in of_kind("comparison"):
        assert answer == f"{max(map(int, re.findall(r'[0-9]+', question)))}更大。"
    for question, answer in of_kind("sequence"):
        one, way, other = re.fullmatch(r"(\w+?)(?:的)?(后面|前面)(?:的数)?是(\w+)。", answer).groups()
        assert one in question
        if one.isdigit():
            assert int(other) == int(one) + 1
        else:
            assert ("前" in question or "上" in question) == (way == "前面")
            place = ZODIAC_FROM_YEAR_4.index(one) + (1 if way == "后面" else -1)
            assert other == ZODIAC_FROM_YEAR_4[place % 12]


def test_units_are_converted_right() -> None:
    for question, answer in of_kind("units"):
        amount, unit, result, part = re.fullmatch(r"(\d+|半|一)(\D+)等于(\d+)(\D+)。", answer).groups()
        unit, part = (name.removeprefix("个") if "星期" in name else name for name in (unit, part))
        whole = {"半": 0.5, "一": 1}.get(amount) or int(amount)
        assert whole * SIZES[unit] == int(result) * SIZES[part], answer
        assert answer.split("等于")[0] in question


def test_weekdays_are_right() -> None:
    monday = datetime.date(2024, 1, 1)
    for said in [*of_kind("weekday"), *of_kind("followup_weekday")]:
        today = WEEKDAYS.index(re.search("今天(?:是)?(?:星期|周)(.)", said[0])[1])
        for question, answer in zip(said[::2], said[1::2], strict=True):
            told, when, day = re.fullmatch("今天是星期(.)，(大?.天)是星期(.)。", answer).groups()
            assert told == WEEKDAYS[today]
            then = monday + datetime.timedelta(days=today + DAYS_LATER[when])
            assert WEEKDAYS[then.weekday()] == day, said
            assert re.search(f"(?<!大){when}", question)


def test_months_are_right() -> None:
    for question, answer in of_kind("months"):
        month = next(name for name in sorted(MONTHS, key=len, reverse=True) if name in question)
        number = MONTHS.index(month)
        following = datetime.date(2023 + number // 11, (number + 1) % 12 + 1, 1)
        days = (following - datetime.date(2023, number + 1, 1)).days
        if re.search(r"\d", answer):
            assert answer == f"{'平年' if number == 1 else ''}{month}有{days}天。"
        elif "下一个" in answer:
            assert answer == f"{month}的下一个月是{MONTHS[(number + 1) % 12]}。"
        elif "上一个" in answer:
            assert answer == f"{month}的上一个月是{MONTHS[number - 1]}。"
        else:
            season = ["冬天", "春天", "夏天", "秋天"][(number + 1) % 12 // 3]
            assert answer == f"北京的{month}是{season}。"


def test_a_follow_up_answers_as_the_question_asked_alone_would() -> None:
    kinds = ("capitals", "continents", "zh_to_en", "classes", "antonyms", "measure_words")
    alone = {said[-1] for kind in kinds for said in of_kind(kind)}
    for said in [*of_kind("followup_places"), *of_kind("followup_words")]:
        assert {said[1], said[3]} <= alone


def test_what_was_said_is_remembered() -> None:
    for said in of_kind("memory"):
        value = re.fullmatch("你(?:叫|喜欢|爱吃|住在)(.+)。", said[-1])[1]
        assert value in said[0]
        assert value in said[1]
