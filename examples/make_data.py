"""Write the data of this repository's recipes: `python examples/make_data.py`, or `--check` to compare.

Owns: the files of `examples/data/` apart from what is written by hand, in `handwritten/`.
Does not know: `graftlm`, tokenizers, models; it needs nothing but Python.
Place on the road: before it. Same seed, same bytes, on every machine.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from data_kinds.chinese import running_text
from data_kinds.english import english_kind, framed, paragraphs, transcripts
from data_kinds.schema import Candidate, Kind, Split, split
from data_kinds.several import several_kinds
from data_kinds.single import single_kinds

SEED = 7
DATA = Path(__file__).parent / "data"
HANDWRITTEN = DATA / "handwritten"
NUM_HANDWRITTEN_HELDOUT = 24
ENGLISH_BYTES = 190_000
ENGLISH_HELDOUT_BYTES = 6_000
NUM_FRAMED = 120


def read_handwritten() -> list[tuple[str, tuple[str, ...]]]:
    """The dialogues written by hand: an id from file and line, and the turns; files in the order of their names."""
    found = []
    for path in sorted(HANDWRITTEN.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            turns = tuple(message["content"] for message in json.loads(line)["messages"])
            found.append((f"handwritten-{path.stem}-{number:03d}", turns))
    return found


def read_prose(name: str) -> list[str]:
    """The paragraphs of a hand-written text, one a line."""
    lines = (HANDWRITTEN / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def to_row(row_id: str, kind: str, turns: tuple[str, ...], is_learnable: bool = True) -> dict:
    """One dialogue in the messages form; `learnable: false` marks kinds beyond a very small model."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    row = {"id": row_id, "kind": kind, "messages": messages}
    return row if is_learnable else {**row, "learnable": False}


def to_rows(name: str, candidates: list[Candidate], part: str, is_learnable: bool = True) -> list[dict]:
    """The rows of one kind in one part, with ids that stay the same while the kind does."""
    return [to_row(f"{name}-{part}-{i:04d}", name, c.turns, is_learnable) for i, c in enumerate(candidates)]


def jsonl(rows: list[dict]) -> str:
    """One row a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def dialogue_files(kinds: list[Kind], chosen: Split) -> dict[str, str]:
    """Generated and hand-written training dialogues, held-out ones of both, and the list of kinds."""
    dice = random.Random(SEED)
    handwritten = read_handwritten()
    kept_back = set(dice.sample(range(len(handwritten)), NUM_HANDWRITTEN_HELDOUT))
    rows: dict[str, list[dict]] = {"dialogues.train": [], "handwritten.train": [], "dialogues.heldout": []}
    for number, (row_id, turns) in enumerate(handwritten):
        is_kept_back = number in kept_back
        part = "dialogues.heldout" if is_kept_back else "handwritten.train"
        rows[part].append(to_row(row_id, "handwritten", turns, not is_kept_back))
    summary: dict[str, dict] = {}
    for kind in kinds:
        train, heldout = chosen.train[kind.name], chosen.heldout[kind.name]
        rows["dialogues.train"] += to_rows(kind.name, train, "train")
        rows["dialogues.heldout"] += to_rows(kind.name, heldout, "heldout", kind.is_learnable)
        summary[kind.name] = describe(kind.title, kind.is_learnable, len(train), len(heldout))
    num_train = len(handwritten) - len(kept_back)
    summary["handwritten"] = describe("手写的自由对话", False, num_train, len(kept_back))
    for part in rows.values():
        dice.shuffle(part)
    files = {f"{name}.jsonl": jsonl(part) for name, part in rows.items()}
    return files | {"kinds.json": json.dumps(summary, ensure_ascii=False, indent=1) + "\n"}


def describe(title: str, is_learnable: bool, num_train: int, num_heldout: int) -> dict:
    """One entry of kinds.json."""
    return {"title": title, "learnable": is_learnable, "num_train": num_train, "num_heldout": num_heldout}


def english_files() -> dict[str, str]:
    """English text and dialogues, with their held-out parts."""
    dice = random.Random(SEED)
    chosen = split([english_kind()], SEED)
    train, heldout = chosen.train["english"], chosen.heldout["english"]
    prose, prose_heldout = read_prose("english.txt"), read_prose("english.heldout.txt")
    generated = paragraphs(ENGLISH_BYTES, f"{SEED}:train")
    unseen = [p for p in paragraphs(ENGLISH_HELDOUT_BYTES, f"{SEED}:heldout") if p not in set(generated)]
    body = [*prose, *generated, *framed(dice.sample(train, NUM_FRAMED)), *transcripts(dice.sample(train, NUM_FRAMED))]
    dice.shuffle(body)
    dice.shuffle(train)
    return {
        "english.txt": "\n".join(body) + "\n",
        "english.heldout.txt": "\n".join([*prose_heldout, *unseen]) + "\n",
        "english_dialogues.jsonl": jsonl(to_rows("english", train, "train")),
        "english_dialogues.heldout.jsonl": jsonl(to_rows("english", heldout, "heldout")),
    }


def all_files() -> dict[str, str]:
    """Every generated file by name."""
    kinds = single_kinds() + several_kinds()
    chosen = split(kinds, SEED)
    files = dialogue_files(kinds, chosen) | english_files()
    rows = [json.loads(line) for line in files["handwritten.train.jsonl"].splitlines()]
    dialogues = [[m["content"] for m in row["messages"]] for row in rows]
    files["chinese.txt"] = running_text(read_prose("chinese.txt"), dialogues, chosen.train, SEED)
    return files


def main() -> int:
    """Write or compare; 0 when the files are as they should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the committed files, write nothing")
    is_check = parser.parse_args().check
    stale = []
    for name, text in all_files().items():
        path = DATA / name
        if path.exists() and path.read_bytes() == text.encode():
            continue
        stale.append(name)
        if not is_check:
            path.write_bytes(text.encode())
    if is_check and stale:
        print(f"not what the generator writes: {', '.join(stale)}", file=sys.stderr)
        print("run: python examples/make_data.py", file=sys.stderr)
        return 1
    print("unchanged" if not stale else f"wrote {', '.join(stale)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
