"""Candidates, kinds and the split into training and held-out rows.

Owns: what a row is, which rows are held out and which may be learnt from. Does not know: any fact.
Place on the road: the kinds offer candidates (fact x phrasing), `split` chooses among them, by seed only.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PREFIXES = ("", "请问，", "我想知道，", "考考你：")
REQUEST_PREFIXES = ("", "请你", "麻烦你", "考考你：")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible dialogue: `turns` alternate user, assistant, and end with the answer that is measured.

    `core` is what is asked apart from how politely: candidates of one core are the same question to the split.
    """

    fact: str
    turns: tuple[str, ...]
    core: str

    @property
    def prompt(self) -> tuple[str, ...]:
        """Everything said before the last answer."""
        return self.turns[:-1]

    @property
    def prefixes(self) -> list[tuple[str, ...]]:
        """The prompt of every answer in the dialogue, the last one included."""
        return [self.turns[:end] for end in range(1, len(self.turns), 2)]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question with all its candidates, and how many of them the split takes."""

    name: str
    title: str
    candidates: Sequence[Candidate]
    num_per_fact: int = 4
    num_heldout: int = 10
    is_learnable: bool = True


@dataclass(slots=True)
class Split:
    """Chosen candidates by kind name."""

    train: dict[str, list[Candidate]] = field(default_factory=dict)
    heldout: dict[str, list[Candidate]] = field(default_factory=dict)


def ask(fact: str, cores: Iterable[str], answer: str) -> list[Candidate]:
    """All single-turn candidates of one fact: every fitting prefix before every core question or request."""
    return [
        Candidate(fact, (prefix + core, answer), core)
        for core in cores
        for prefix in (PREFIXES if core.endswith("？") else REQUEST_PREFIXES)
    ]


def split(kinds: Sequence[Kind], seed: int) -> Split:
    """Hold out whole questions, then take training rows that never contain one, however politely.

    A held-out fact is always seen in training, asked in other words or in another combination. A held-out prompt
    occurs in no training dialogue, not even as its first turn, and neither does the same core.
    """
    result = Split()
    shuffled: dict[str, dict[str, list[Candidate]]] = {}
    for kind in kinds:
        dice = random.Random(f"{seed}:{kind.name}")
        by_fact: dict[str, list[Candidate]] = {}
        for candidate in kind.candidates:
            by_fact.setdefault(candidate.fact, []).append(candidate)
        for group in by_fact.values():
            dice.shuffle(group)
        shuffled[kind.name] = by_fact
        facts = [fact for fact, group in by_fact.items() if len({c.core for c in group}) > 1]
        chosen = dice.sample(facts, min(kind.num_heldout, len(facts)))
        result.heldout[kind.name] = [by_fact[fact][0] for fact in chosen]
    held = [candidate for rows in result.heldout.values() for candidate in rows]
    prompts, cores = {candidate.prompt for candidate in held}, {candidate.core for candidate in held}
    used: set[tuple[str, ...]] = set()
    for kind in kinds:
        rows: list[Candidate] = []
        for group in shuffled[kind.name].values():
            free = [
                c
                for c in group
                if c.core not in cores
                and prompts.isdisjoint(c.prefixes)
                and cores.isdisjoint(c.turns[:-1:2])
                and c.prompt not in used
            ]
            taken = free[: kind.num_per_fact]
            used.update(candidate.prompt for candidate in taken)
            rows.extend(taken)
        result.train[kind.name] = rows
    return result
