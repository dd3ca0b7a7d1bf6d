"""Kinds of several turns, whose last question cannot be answered without the history.

Owns: follow-up questions over the same facts as the single kinds, and things the user said before.
Does not know: which rows are held out. Place on the road: facts -> candidates.
"""

import random

from data_kinds.schema import Candidate, Kind
from data_kinds.words import ANTONYMS, MEASURE_WORDS, MEMORIES, MEMORY_VALUES, THINGS
from data_kinds.world import COUNTRIES, DAY_OFFSETS, WEEKDAYS

AND_THIS = ("那{x}呢？", "{x}呢？", "那么{x}呢？", "换成{x}呢？")
NUM_PARTNERS = 12

# relation -> first question, answer
WORD_RELATIONS = {
    "english": (["“{x}”用英语怎么说？", "“{x}”的英文是什么？"], "{x}的英语是 {y}。"),
    "class": (["{x}属于哪一类？", "{x}算哪一类？"], "{x}属于{y}。"),
    "antonym": (["“{x}”的反义词是什么？", "说出“{x}”的反义词。"], "“{x}”的反义词是“{y}”。"),
    "measure": (["“{x}”用什么量词？", "“{x}”的量词是什么？"], "一{y}{x}。"),
}


def and_this(
    facts: dict[str, str], firsts: list[str], answer: str, relation: str, dice: random.Random
) -> list[Candidate]:
    """Dialogues that ask the relation of one thing, then only name a second thing."""
    result = []
    for second, value in facts.items():
        partners = [first for first in facts if first != second]
        for first in dice.sample(partners, NUM_PARTNERS):
            opening = dice.choice(firsts).format(x=first)
            again = dice.choice(AND_THIS).format(x=second)
            turns = (opening, answer.format(x=first, y=facts[first]), again, answer.format(x=second, y=value))
            result.append(Candidate(f"{relation} {second}", turns, f"{relation} {first} {second}"))
    return result


def followup_places() -> Kind:
    """中国的首都是哪里？ … 那法国呢？"""
    dice = random.Random("followup_places")
    capitals = {row[0]: row[1] for row in COUNTRIES}
    continents = {row[0]: row[2] for row in COUNTRIES if row[0] != "埃及"}
    capital = ["{x}的首都是哪里？", "{x}的首都是哪座城市？", "{x}的首都叫什么？"]
    result = and_this(capitals, capital, "{x}的首都是{y}。", "capital", dice)
    continent = ["{x}在哪个洲？", "{x}位于哪个大洲？", "{x}属于哪个洲？"]
    result += and_this(continents, continent, "{x}在{y}。", "continent", dice)
    return Kind("followup_places", "追问：那法国呢", result, 3, 14)


def followup_words() -> Kind:
    """“苹果”用英语怎么说？ … 那“香蕉”呢？"""
    dice = random.Random("followup_words")
    facts = {
        "english": {zh: en for zh, en, _ in THINGS},
        "class": {zh: group for zh, _, group in THINGS},
        "antonym": dict(map(tuple, ANTONYMS)),
        "measure": dict(map(tuple, MEASURE_WORDS)),
    }
    result = []
    for relation, (firsts, answer) in WORD_RELATIONS.items():
        result += and_this(facts[relation], firsts, answer, relation, dice)
    return Kind("followup_words", "追问：那香蕉呢", result, 2, 14)


def followup_arithmetic() -> Kind:
    """3加4等于几？ … 再加2呢？"""
    result = []
    for a in range(1, 9):
        for b in range(1, 10 - a):
            total = a + b
            opening = (f"{a}加{b}等于几？", f"{a}加{b}等于{total}。")
            for c in range(1, 11 - total):
                for again in (f"再加{c}呢？", f"再加上{c}呢？", f"然后再加{c}呢？"):
                    turns = (*opening, again, f"{total}加{c}等于{total + c}。")
                    result.append(Candidate(f"{total}加{c}", turns, f"{a}加{b}再加{c}"))
            for c in range(1, total):
                for again in (f"再减{c}呢？", f"再减去{c}呢？", f"然后再减{c}呢？"):
                    turns = (*opening, again, f"{total}减{c}等于{total - c}。")
                    result.append(Candidate(f"{total}减{c}", turns, f"{a}加{b}再减{c}"))
    return Kind("followup_arithmetic", "追问：再加2呢", result, 2, 14)


def followup_weekday() -> Kind:
    """今天星期三，明天星期几？ … 那后天呢？"""
    result = []
    for number, day in enumerate(WEEKDAYS):
        for first, first_offset in DAY_OFFSETS.items():
            for second, offset in DAY_OFFSETS.items():
                if first == second:
                    continue
                opening = f"今天星期{day}，{first}星期几？"
                reply = f"今天是星期{day}，{first}是星期{WEEKDAYS[(number + first_offset) % 7]}。"
                answer = f"今天是星期{day}，{second}是星期{WEEKDAYS[(number + offset) % 7]}。"
                for again in AND_THIS[:3]:
                    turns = (opening, reply, again.format(x=second), answer)
                    result.append(Candidate(f"{day}{second}", turns, f"{day}{first}{second}"))
    return Kind("followup_weekday", "追问：那后天呢", result, 4, 12)


def memory() -> Kind:
    """The user says something about himself and asks for it later, sometimes after another question."""
    dice = random.Random("memory")
    between = [
        ("你会做什么？", "我会算数、翻译，也能回答小问题。"),
        ("谢谢你。", "不客气！"),
        ("你好吗？", "我很好，谢谢你！"),
        ("3加4等于几？", "3加4等于7。"),
        ("中国的首都是哪里？", "中国的首都是北京。"),
    ]
    result = []
    for topic, (sayings, reply, questions, answer) in MEMORIES.items():
        for value in MEMORY_VALUES[topic]:
            for saying in sayings:
                for question in questions:
                    turns = [saying.format(x=value), reply.format(x=value)]
                    if dice.random() < 0.3:
                        turns += dice.choice(between)
                    turns += [question, answer.format(x=value)]
                    result.append(Candidate(f"{topic} {value}", tuple(turns), f"{turns[0]} {question}"))
    return Kind("memory", "记住前文", result, 3, 16)


def several_kinds() -> list[Kind]:
    """All kinds of several turns."""
    return [followup_places(), followup_words(), followup_arithmetic(), followup_weekday(), memory()]
