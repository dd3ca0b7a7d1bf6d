"""English text for the base: paragraphs of generated facts and small stories, and English dialogues.

Owns: the English sentence grammar, over the same facts as the Chinese kinds. Does not know: Chinese phrasings.
Place on the road: the base of the demo learns this text before any Chinese is grafted onto it.
"""

import random

from data_kinds.schema import Candidate, Kind
from data_kinds.tables import lines, listed, table
from data_kinds.words import THINGS
from data_kinds.world import COUNTRIES

NUMBERS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
WEEKDAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
SEASONS = listed("winter winter spring spring spring summer summer summer autumn autumn autumn winter")
CLASSES = {
    "水果": "fruit",
    "动物": "animal",
    "蔬菜": "vegetable",
    "交通工具": "vehicle",
    "文具": "piece of stationery",
    "家具": "piece of furniture",
    "乐器": "musical instrument",
    "衣物": "piece of clothing",
}
ANTONYMS = table(
    "big|small long|short fast|slow hot|cold black|white up|down left|right inside|outside new|old early|late "
    "far|near heavy|light true|false good|bad high|low buy|sell strong|weak wide|narrow thick|thin deep|shallow "
    "soft|hard wet|dry safe|dangerous simple|complex friend|enemy day|night clean|dirty quiet|noisy brave|timid "
    "remember|forget open|closed full|empty rich|poor sweet|bitter win|lose"
)
UNITS = [
    "A metre has 100 centimetres.",
    "A kilometre has 1000 metres.",
    "A centimetre has 10 millimetres.",
    "A kilogram has 1000 grams.",
    "A ton has 1000 kilograms.",
    "A litre has 1000 millilitres.",
    "An hour has 60 minutes.",
    "A minute has 60 seconds.",
    "A day has 24 hours.",
    "A week has 7 days.",
    "A year has 12 months.",
    "A century has 100 years.",
    "Half an hour is 30 minutes.",
    "A quarter of an hour is 15 minutes.",
]
DEFINITIONS = lines("""
hospital|A hospital is a place where sick people are treated.
school|A school is a place where students learn.
library|A library is a place where people read and borrow books.
bank|A bank is a place where people keep their money.
airport|An airport is a place where planes take off and land.
museum|A museum is a place where old and precious things are shown.
kitchen|A kitchen is a room where food is cooked.
doctor|A doctor is a person who treats sick people.
teacher|A teacher is a person who teaches students.
driver|A driver is a person who drives a car.
farmer|A farmer is a person who grows food.
painter|A painter is a person who paints pictures.
writer|A writer is a person who writes books.
dictionary|A dictionary is a book that explains words.
calendar|A calendar is a thing that shows the days of the year.
thermometer|A thermometer is a tool that measures temperature.
umbrella|An umbrella is a thing that keeps off the rain.
clock|A clock is a thing that shows the time.
telescope|A telescope is a tool for looking at things far away.
microscope|A microscope is a tool for looking at very small things.
ruler|A ruler is a tool for measuring length.
key|A key is a thing that opens a lock.
desert|A desert is a place with very little rain.
island|An island is land with water all around it.
volcano|A volcano is a mountain that can throw out hot rock.
earthquake|An earthquake is a sudden shaking of the ground.
""")
# alternately "he" and "she"
PEOPLE = listed("Tom Anna Peter Lucy Ben Mary Jack Emma Sam Nora Paul Ella Max Rosa Leo Ida")
TOWN = listed("market library school park station museum harbour bakery garden farm zoo")
RELATIVES = listed("mother father sister brother aunt uncle grandmother grandfather friend neighbour teacher")
TOPICS = listed("sea river mountain moon sun rain snow wind tree school city music bread rice tea")
MOODS = listed("happy tired hungry sad proud surprised calm worried glad curious")
WEATHERS = ["The sun was shining", "It was raining", "It was cold", "The wind was strong", "Snow was falling"]
WEATHERS += ["The sky was grey", "It was a warm morning", "The evening was quiet", "The streets were wet"]
ENDS = ["Then they all went home.", "It was a good day.", "Nobody was in a hurry.", "In the end they laughed."]
ENDS += ["Soon it was time for dinner.", "They decided to come again next week.", "After that it grew dark."]
FRAME_LINES = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Response:",
)


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    """The plural of a noun of the tables."""
    if noun in ("sheep", "fish"):
        return noun
    if noun.endswith(("s", "ch", "sh", "x")) or noun in ("potato",):
        return noun + "es"
    return noun + "s"


def capital_first(sentence: str) -> str:
    """The sentence with its first letter in upper case."""
    return sentence[0].upper() + sentence[1:]


def number_facts(dice: random.Random) -> list[str]:
    """Sentences about small sums, differences, products and comparison, each with its own numbers."""
    a, b = dice.randint(1, 9), dice.randint(1, 9)
    low, high = sorted((a, b))
    result = [f"{a} plus {b} equals {a + b}.", f"If you add {b} to {a}, you get {a + b}."]
    result += [f"{NUMBERS[a].capitalize()} and {NUMBERS[b]} make {NUMBERS[a + b]}."]
    result += [f"{low} times {high} equals {a * b}.", f"After {a + b} comes {a + b + 1}."]
    if low < high:
        result += [f"{high} minus {low} equals {high - low}.", f"{high} is larger than {low}."]
        result += [f"{NUMBERS[low].capitalize()} is smaller than {NUMBERS[high]}."]
    return result


def calendar_facts(dice: random.Random) -> list[str]:
    """Sentences about weekdays and months."""
    day, month = dice.randrange(7), dice.randrange(12)
    if_today = f"If today is {WEEKDAYS[day]},"
    days = "28 days in most years" if month == 1 else f"{MONTH_DAYS[month]} days"
    return [
        f"{if_today} tomorrow is {WEEKDAYS[(day + 1) % 7]}.",
        f"{if_today} yesterday was {WEEKDAYS[day - 1]}.",
        f"{if_today} the day after tomorrow is {WEEKDAYS[(day + 2) % 7]}.",
        f"{WEEKDAYS[(day + 1) % 7]} comes after {WEEKDAYS[day]}.",
        f"{MONTHS[(month + 1) % 12]} comes after {MONTHS[month]}.",
        f"{MONTHS[month]} has {days}.",
        f"In Europe, {MONTHS[month]} is in {SEASONS[month]}.",
    ]


def world_facts(dice: random.Random) -> list[str]:
    """Sentences about countries."""
    *_, country, city, continent = dice.choice(COUNTRIES)
    result = [
        f"The capital of {country} is {city}.",
        f"{city} is the capital of {country}.",
        f"People who visit {country} often see {city} first.",
    ]
    if country != "Egypt":
        result.append(capital_first(f"{country} {'are' if country.endswith('Philippines') else 'is'} in {continent}."))
    return result


def thing_facts(dice: random.Random) -> list[str]:
    """Sentences about animals, fruit and tools, opposites, units and definitions."""
    _, noun, group = dice.choice(THINGS)
    other = dice.choice([en for _, en, g in THINGS if g != group])
    one, two = dice.choice(ANTONYMS)
    kind = CLASSES[group]
    return [
        capital_first(f"{article(noun)} is {article(kind)}."),
        capital_first(f"{article(other)} is not {article(kind)}, but {article(noun)} is."),
        f"The opposite of {one} is {two}.",
        f"The opposite of {two} is {one}.",
        dice.choice(UNITS),
        dice.choice(DEFINITIONS)[1],
    ]


def story(dice: random.Random) -> str:
    """A small story of four to seven sentences, with numbers that add up."""
    who, friend = dice.sample(PEOPLE, 2)
    place, relative, mood = dice.choice(TOWN), dice.choice(RELATIVES), dice.choice(MOODS)
    fruit = plural(dice.choice([en for _, en, g in THINGS if g in ("水果", "蔬菜")]))
    animal = dice.choice([en for _, en, g in THINGS if g == "动物"])
    a, b = dice.randint(2, 9), dice.randint(2, 9)
    pronoun = "his" if PEOPLE.index(who) % 2 == 0 else "her"
    opening = (
        f"{dice.choice(WEATHERS)} on {dice.choice(WEEKDAYS)}, and {who} went to the {place} with {pronoun} {relative}."
    )
    middle = [
        f"On the way they saw {article(animal)}.",
        f"{who} bought {NUMBERS[a]} {fruit} and {friend} bought {NUMBERS[b]}.",
        f"Together they had {NUMBERS[a + b]} {fruit}.",
        f"\u201cDo you like {fruit}?\u201d asked {friend}.",
        f"\u201cYes, I do,\u201d said {who}.",
        f"{friend} was {mood}, and {who} asked why.",
        "The {} told them about the {} and the {}.".format(relative, *dice.sample(TOPICS, 2)),
    ]
    length = dice.randint(3, 6)
    keep = sorted(dice.sample(range(len(middle)), length))
    if 2 in keep and 1 not in keep:
        keep = sorted({*keep, 1})
    return " ".join([opening, *(middle[i] for i in keep), dice.choice(ENDS)])


def paragraphs(num_bytes: int, seed: str) -> list[str]:
    """At least `num_bytes` of different paragraphs, one a line: facts of one domain, or a story."""
    dice = random.Random(seed)
    domains = (number_facts, calendar_facts, world_facts, thing_facts)
    result: dict[str, None] = {}
    while sum(map(len, result)) < num_bytes:
        if dice.random() < 0.45:
            result[story(dice)] = None
            continue
        domain = dice.choice(domains)
        sentences = [dice.choice(domain(dice)) for _ in range(dice.randint(3, 6))]
        result[" ".join(dict.fromkeys(sentences))] = None
    return list(result)


def framed(dialogues: list[Candidate]) -> list[str]:
    """The dialogues as the card's prompt prints them (without its empty lines, which end a document), so that the
    words of the frame become a piece each."""
    start, instruction, response = FRAME_LINES
    return [f"{start}\n{instruction}\n{c.turns[0]}\n{response}\n{c.turns[-1]}" for c in dialogues]


def transcripts(dialogues: list[Candidate]) -> list[str]:
    """The dialogues as spoken lines, so that the two speakers of the card's prompt become a piece each."""
    return [f"\u201cHuman: {c.turns[0]}\u201d \u201cAssistant: {c.turns[-1]}\u201d" for c in dialogues]


def english_kind() -> Kind:
    """English questions with one short answer, over the facts of the text."""
    rows: list[tuple[str, list[str], str]] = []
    for *_, country, city, _ in COUNTRIES:
        cores = [f"What is the capital of {country}?", f"Which city is the capital of {country}?"]
        rows.append((country, [*cores, f"Name the capital of {country}."], f"The capital of {country} is {city}."))
    for one, two in ANTONYMS:
        cores = [f"What is the opposite of {one}?", f"Which word means the opposite of {one}?"]
        rows.append((one, [*cores, f"Give the opposite of {one}."], f"The opposite of {one} is {two}."))
    for noun, sentence in DEFINITIONS:
        cores = [
            f"What is {article(noun)}?",
            f"Explain what {article(noun)} is.",
            f"Can you tell me what {article(noun)} is?",
        ]
        rows.append((noun, cores, sentence))
    for number, day in enumerate(WEEKDAYS):
        cores = [f"Which day comes after {day}?", f"What is the day after {day}?", f"What day follows {day}?"]
        rows.append((day, cores, f"{WEEKDAYS[(number + 1) % 7]} comes after {day}."))
    for number, month in enumerate(MONTHS):
        cores = [
            f"Which month comes after {month}?",
            f"What is the month after {month}?",
            f"What month follows {month}?",
        ]
        rows.append((month, cores, f"{MONTHS[(number + 1) % 12]} comes after {month}."))
    candidates = [Candidate(fact, (core, answer), core) for fact, cores, answer in rows for core in cores]
    return Kind("english", "English", candidates, 2, 40)
