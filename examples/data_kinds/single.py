"""Kinds of one question and one answer.

Owns: how a fact is asked and its one canonical answer. Does not know: which rows are held out.
Place on the road: facts -> candidates; `schema.split` chooses among them.
"""

from collections.abc import Sequence

from data_kinds.schema import Candidate, Kind, ask
from data_kinds.words import (
    ADDRESSES,
    ANTONYMS,
    COLOURS,
    GREETINGS,
    IDIOMS,
    MEASURE_WORDS,
    THINGS,
    WORDS,
)
from data_kinds.world import (
    COUNTRIES,
    DAY_OFFSETS,
    DEFINITIONS,
    ELEMENTS,
    FESTIVALS,
    MONTH_DAYS,
    MONTHS,
    PLACES,
    PROVINCES,
    SEASONS,
    UNITS,
    WEEKDAYS,
    ZODIAC,
)

OPERATIONS = {"加": lambda a, b: a + b, "减": lambda a, b: a - b, "乘": lambda a, b: a * b}
SIGNS = {"加": "+", "减": "-", "乘": "×"}
RESULT_NAMES = {"加": "和", "减": "差", "乘": "积"}


def fill(templates: Sequence[str], **slots: object) -> list[str]:
    """Each template with its slots filled."""
    return [template.format(**slots) for template in templates]


def facts_to_candidates(rows: Sequence[tuple[str, str, dict[str, object]]], cores: Sequence[str]) -> list[Candidate]:
    """Rows of (fact, answer, slots) asked through every core question."""
    return [c for fact, answer, slots in rows for c in ask(fact, fill(cores, **slots), answer)]


def arithmetic() -> Kind:
    """Sums up to ten, differences and products of one-digit numbers."""
    cores = ["{a}{op}{b}等于几？", "{a}{op}{b}是多少？", "{a}{sign}{b}=？", "{a}和{b}的{name}是多少？"]
    cores += ["算一算：{a}{op}{b}。", "{a}{op}{b}得几？"]
    pairs = [("加", a, b) for a in range(1, 10) for b in range(1, 11 - a)]
    pairs += [("减", a, b) for a in range(2, 11) for b in range(1, a)]
    pairs += [("乘", a, b) for a in range(2, 10) for b in range(a, 10)]
    rows = [
        (
            f"{a}{op}{b}",
            f"{a}{op}{b}等于{OPERATIONS[op](a, b)}。",
            {"a": a, "b": b, "op": op, "sign": SIGNS[op], "name": RESULT_NAMES[op]},
        )
        for op, a, b in pairs
    ]
    return Kind("arithmetic", "十以内加减和乘法口诀", facts_to_candidates(rows, cores), 4, 24)


def arithmetic_large() -> Kind:
    """Sums of two-digit numbers that training never shows: not learnable at this size, asked for honesty."""
    cores = ["{a}加{b}等于几？", "{a}加{b}是多少？"]
    rows = [
        (f"{a}加{b}", f"{a}加{b}等于{a + b}。", {"a": a, "b": b}) for a in range(11, 60, 7) for b in range(12, 48, 7)
    ]
    return Kind("arithmetic_large", "两位数加法", facts_to_candidates(rows, cores), 1, 15, False)


def comparison() -> Kind:
    """Which of two numbers up to 12 is larger."""
    cores = ["{a}和{b}哪个大？", "{a}和{b}相比，谁更大？", "{a}与{b}，哪个数更大？", "在{a}和{b}当中，哪个比较大？"]
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13) if a != b and (7 * a + 3 * b) % 3 == 0]
    rows = [(f"{a} {b}", f"{max(a, b)}更大。", {"a": a, "b": b}) for a, b in pairs]
    return Kind("comparison", "比较大小", facts_to_candidates(rows, cores), 2, 12)


def units() -> Kind:
    """How many of a small unit make a larger one."""
    cores = ["{whole}等于多少{part}？", "{whole}是多少{part}？", "{whole}有多少{part}？", "{whole}合多少{part}？"]
    cores += ["多少{part}等于{whole}？"]
    rows = [(f"{w}/{p}", f"{w}等于{n}{p}。", {"whole": w, "part": p}) for w, p, n in UNITS]
    return Kind("units", "单位换算", facts_to_candidates(rows, cores), 5, 10)


def weekday() -> Kind:
    """The weekday some days before or after a given one."""
    cores = [
        "今天星期{day}，{when}星期几？",
        "今天是星期{day}，{when}是星期几？",
        "如果今天星期{day}，{when}是星期几？",
    ]
    cores += ["今天周{day}，{when}周几？", "今天是周{day}，那么{when}是星期几？"]
    rows = []
    for number, day in enumerate(WEEKDAYS):
        for when, offset in DAY_OFFSETS.items():
            answer = f"今天是星期{day}，{when}是星期{WEEKDAYS[(number + offset) % 7]}。"
            rows.append((day + when, answer, {"day": day, "when": when}))
    return Kind("weekday", "星期推算", facts_to_candidates(rows, cores), 5, 12)


def months() -> Kind:
    """The month before and after, its length and its season."""
    result: list[Candidate] = []
    for number, month in enumerate(MONTHS):
        after, before = MONTHS[(number + 1) % 12], MONTHS[number - 1]
        days, season = MONTH_DAYS[number], SEASONS[number]
        cores = fill(
            ["{m}的下一个月是几月？", "{m}过完是几月？", "{m}后面是哪个月？", "{m}之后的一个月是几月？"], m=month
        )
        result += ask(month + ">", cores, f"{month}的下一个月是{after}。")
        cores = fill(["{m}的上一个月是几月？", "{m}前面是哪个月？", "{m}之前的一个月是几月？"], m=month)
        result += ask(month + "<", cores, f"{month}的上一个月是{before}。")
        year = "平年" if days == 28 else ""
        cores = fill(["{m}有多少天？", "{m}一共有几天？", "{m}有几天？", "{m}是多少天？"], m=year + month)
        result += ask(month + "#", cores, f"{year}{month}有{days}天。")
        cores = fill(["在北京，{m}是什么季节？", "北京的{m}属于哪个季节？", "北京{m}是哪个季节？"], m=month)
        result += ask(month + "*", cores, f"北京的{month}是{season}。")
    return Kind("months", "月份与季节", result, 5, 12)


def festivals() -> Kind:
    """The day of a festival."""
    cores = ["{x}是几月几日？", "{x}是哪一天？", "{x}在什么时候？", "哪一天是{x}？", "每年的{x}是哪天？"]
    rows = [(name, f"{name}是{day}。", {"x": name}) for name, day in FESTIVALS]
    return Kind("festivals", "节日", facts_to_candidates(rows, cores), 5, 8)


def sequence() -> Kind:
    """What follows and precedes in the zodiac and among small numbers."""
    result: list[Candidate] = []
    for number, animal in enumerate(ZODIAC):
        after, before = ZODIAC[(number + 1) % 12], ZODIAC[number - 1]
        cores = ["十二生肖里，{x}的后面是什么？", "生肖中排在{x}后面的是什么？", "生肖{x}的下一个是什么？"]
        result += ask(animal + ">", fill(cores, x=animal), f"{animal}的后面是{after}。")
        cores = ["十二生肖里，{x}的前面是什么？", "生肖中排在{x}前面的是什么？", "生肖{x}的上一个是什么？"]
        result += ask(animal + "<", fill(cores, x=animal), f"{animal}的前面是{before}。")
    for number in range(1, 20):
        cores = ["{x}后面的数是几？", "{x}的下一个数是几？", "数完{x}该数几？", "紧跟在{x}后面的数是几？"]
        result += ask(str(number), fill(cores, x=number), f"{number}后面的数是{number + 1}。")
    return Kind("sequence", "顺序", result, 4, 12)


def translation() -> list[Kind]:
    """Single words, from Chinese into English and back."""
    pairs = [(zh, en) for zh, en, _ in THINGS] + [(zh, en) for zh, en in WORDS]
    to_english = ["“{x}”用英语怎么说？", "“{x}”的英文是什么？", "把“{x}”翻译成英语。", "英语里“{x}”怎么说？"]
    to_english += ["“{x}”翻译成英文是什么？"]
    to_chinese = ["单词 {x} 是什么意思？", "英语单词 {x} 的中文是什么？", "把单词 {x} 翻译成中文。"]
    to_chinese += ["单词 {x} 用中文怎么说？", "英文里的 {x} 是什么意思？"]
    english = facts_to_candidates([(zh, f"{zh}的英语是 {en}。", {"x": zh}) for zh, en in pairs], to_english)
    chinese = facts_to_candidates([(en, f"单词 {en} 的意思是{zh}。", {"x": en}) for zh, en in pairs], to_chinese)
    return [
        Kind("zh_to_en", "中译英", english, 4, 14),
        Kind("en_to_zh", "英译中", chinese, 4, 14),
    ]


def geography() -> list[Kind]:
    """Capitals, continents and seats of the provinces."""
    capital = [
        "{x}的首都是哪里？",
        "{x}的首都是哪座城市？",
        "{x}的首都叫什么？",
        "哪座城市是{x}的首都？",
        "{x}首都在哪儿？",
    ]
    continent = ["{x}在哪个洲？", "{x}位于哪个大洲？", "{x}属于哪个洲？", "{x}是哪个洲的国家？"]
    seat = ["{x}省的省会是哪里？", "{x}的省会是哪座城市？", "{x}省会叫什么？", "哪座城市是{x}省的省会？"]
    capitals = [(row[0], f"{row[0]}的首都是{row[1]}。", {"x": row[0]}) for row in COUNTRIES]
    # Egypt's Sinai lies in Asia: the question is left out rather than answered roughly
    continents = [(row[0], f"{row[0]}在{row[2]}。", {"x": row[0]}) for row in COUNTRIES if row[0] != "埃及"]
    seats = [(name, f"{name}的省会是{city}。", {"x": name}) for name, city in PROVINCES]
    return [
        Kind("capitals", "各国首都", facts_to_candidates(capitals, capital), 5, 10),
        Kind("continents", "国家所在的洲", facts_to_candidates(continents, continent), 4, 10),
        Kind("provinces", "中国省会", facts_to_candidates(seats, seat), 5, 10),
    ]


def words() -> list[Kind]:
    """Antonyms, colours, classes, measure words and idioms."""
    antonym = ["“{x}”的反义词是什么？", "和“{x}”意思相反的词是什么？", "“{x}”的反面是什么？", "说出“{x}”的反义词。"]
    colour = ["{x}是什么颜色？", "{x}一般是什么颜色？", "{x}的颜色是什么？", "{x}看起来是什么颜色的？"]
    group = ["{x}属于哪一类？", "{x}是什么类别的东西？", "{x}算哪一类？", "如果分类，{x}属于什么？"]
    measure = ["“{x}”用什么量词？", "“{x}”的量词是什么？", "一什么{x}，该填哪个量词？", "数{x}的时候用哪个量词？"]
    idiom = ["成语“{x}”怎么补全？", "把成语补充完整：{x}。", "“{x}”补全以后是什么成语？", "补全成语：{x}。"]
    colours = [(x, f"{x}是{colour_name}。", {"x": x}) for x, colour_name in COLOURS]
    idioms = [(x, f"{x}。", {"x": x[:3] + "（）"}) for x in IDIOMS]
    rows = {
        "antonyms": ("反义词", [(x, f"“{x}”的反义词是“{y}”。", {"x": x}) for x, y in ANTONYMS], antonym, 5, 12),
        "colours": ("颜色", colours, colour, 5, 10),
        "classes": ("分类", [(x, f"{x}属于{group_name}。", {"x": x}) for x, _, group_name in THINGS], group, 4, 10),
        "measure_words": ("量词", [(x, f"一{y}{x}。", {"x": x}) for x, y in MEASURE_WORDS], measure, 4, 10),
        "idioms": ("成语补全", idioms, idiom, 5, 10),
    }
    return [
        Kind(name, title, facts_to_candidates(facts, cores), per_fact, num_heldout)
        for name, (title, facts, cores, per_fact, num_heldout) in rows.items()
    ]


def definitions() -> Kind:
    """What a common thing is, in one short sentence."""
    cores = ["什么是{x}？", "{x}是什么？", "解释一下{x}。", "用一句话说明什么是{x}。", "“{x}”指的是什么？"]
    rows = [(name, sentence, {"x": name}) for name, sentence in DEFINITIONS]
    return Kind("definitions", "释义", facts_to_candidates(rows, cores), 5, 10)


def places() -> Kind:
    """Where one goes to do something."""
    cores = ["{x}要去哪里？", "想{x}，该去什么地方？", "我要{x}，去哪儿好？", "{x}应该去哪里？"]
    rows = [(act, f"{act}要去{place}。", {"x": act}) for act, place in PLACES]
    return Kind("places", "去处", facts_to_candidates(rows, cores), 5, 8)


def elements() -> Kind:
    """The symbol of a chemical element."""
    cores = ["{x}的元素符号是什么？", "元素{x}用什么符号表示？", "{x}的化学符号是什么？", "化学里{x}怎么写？"]
    rows = [(name, f"{name}的元素符号是 {symbol}。", {"x": name}) for name, symbol in ELEMENTS]
    return Kind("elements", "元素符号", facts_to_candidates(rows, cores), 5, 8)


def greetings() -> Kind:
    """Greetings, thanks, farewells and the model's account of itself; a mark at the end is no new question."""
    result = []
    for sayings, answer in GREETINGS:
        for saying in sayings.split("|"):
            for address in ADDRESSES:
                core = address + saying.rstrip("？")
                ends = ("？",) if saying.endswith("？") else ("。", "！", "")
                result += [Candidate(answer, (core + end, answer), core) for end in ends]
    return Kind("greetings", "问候与自我介绍", result, 12, 14)


def single_kinds() -> list[Kind]:
    """All kinds of one turn."""
    kinds = [arithmetic(), comparison(), units(), weekday(), months(), festivals(), sequence()]
    kinds += [*translation(), *geography(), *words(), definitions(), places(), elements(), greetings()]
    return [*kinds, arithmetic_large()]
