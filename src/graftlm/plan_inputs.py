"""What a plan takes from a recipe: stages, the model's shape, and what is known of the rows before anything was made.

Owns the estimates where nothing is known yet, each with words that say so; what a run's folder holds already is taken
instead. The sums are made in `health/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from graftlm.errors import UserError
from graftlm.health.plan import StageWish
from graftlm.health.row_facts import RowFacts, estimated_rows
from graftlm.model.shapes import Shape, find_shape, shape_of
from graftlm.model.weights import read_model_config
from graftlm.recipe import Recipe, Scratch, Source
from graftlm.recipe_values import files_named, has_files
from graftlm.run import read_json
from graftlm.text.files import open_files
from graftlm.text.readers import read_source
from graftlm.text.rows import TokenRows
from graftlm.text.tokenizer.inventory import read_inventory
from graftlm.training.room import facts_of, wish_of

BELLE_TOKENS, BELLE_LABEL_SHARE = 177.0, 0.52
"""Of a row of BELLE with the 49,953-piece tokenizer, measured; the card's 500,000 rows are of that set."""
TEMPLATE_TOKENS, SHARED_TOKENS = 37, 29
"""Of the card's and Alpaca's template, and those before the question, with Llama's tokenizer."""
CARD_NEW_PIECES = 17_953
UNKNOWN_ROWS = 100_000
COUNTED_BYTES = 50_000_000


def wishes_of(recipe: Recipe, folder: Path | None) -> tuple[list[StageWish], list[str]]:
    """The recipe's stages, that of a base from nothing first, and what was read or assumed of the model.

    `folder` is the run's, whose grown model and rows are taken where it has them; None: as if there were none.
    Raises UserError where the base's shape cannot be known.
    """
    shape, num_new, told = _shape(recipe, folder)
    wishes = []
    scratch = recipe.base.scratch
    if scratch is not None:
        wishes.append(
            wish_of(scratch.training, "base.scratch.training", _scratch_shape(scratch), 0, _scratch_rows(scratch))
        )
    dialogues = _dialogue_rows(recipe, folder)
    for stage in recipe.stages:
        rows = dialogues if stage.objective == "dialogue" else _text_rows(recipe, folder)
        wishes.append(wish_of(stage, f"stages.{stage.name}", shape, num_new, rows))
    return wishes, told


def with_tokens(wish: StageWish, tokens: float) -> StageWish:
    """A stage on as many more rows like its own as hold so many tokens. Raises UserError where that is not one row."""
    if not tokens >= wish.rows.longest:
        raise UserError(f"--tokens {tokens:g} is less than one row has.", "Give the tokens of all rows, say 1e9.")
    num_rows = round(tokens / wish.rows.mean_tokens)
    told = f"{num_rows:,}, {tokens:.3g} tokens as asked (--tokens), lengths as of {wish.rows.source}"
    return replace(wish, rows=replace(wish.rows, num_rows=num_rows, source=told))


def _shape(recipe: Recipe, folder: Path | None) -> tuple[Shape, int, list[str]]:
    """The grown model's shape, how many of its rows are new, and where that was read."""
    grown = folder / "2-base" if folder and _is_of_recipe(folder, recipe, ("base", "tokenizer")) else None
    if grown and (grown / "grow.json").is_file():
        facts = read_json(grown / "grow.json")
        shape = shape_of(read_model_config(grown), str(grown))
        return shape, facts["num_rows_new"] - facts["num_rows_old"], [f"model: {grown}"]
    if recipe.base.scratch is not None:
        shape, where = _scratch_shape(recipe.base.scratch), "base.scratch"
    else:
        assert recipe.base.model is not None
        shape, where = find_shape(recipe.base.model)
    num_new, why = _new_rows(recipe)
    return shape.with_rows(shape.num_rows + num_new), num_new, [f"shape: {where}", f"new rows: {why}"]


def _scratch_shape(scratch: Scratch) -> Shape:
    return Shape(
        num_layers=scratch.num_layers,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_heads=scratch.num_heads,
        num_kv_heads=scratch.num_heads,
        head_size=scratch.hidden_size // scratch.num_heads,
        num_rows=scratch.num_pieces,
        is_tied=scratch.tied,
    )


def _new_rows(recipe: Recipe) -> tuple[int, str]:
    section = recipe.tokenizer
    if section.mode == "keep":
        return 0, "none (tokenizer.mode keep)"
    pad = 1 if section.pad_piece else 0
    if section.num_pieces is not None or section.mode == "continued":
        return (section.num_pieces or 8000) + pad, "tokenizer.num_pieces"
    try:
        count = len(read_inventory(section.pieces or ""))
    except UserError:
        return CARD_NEW_PIECES + pad, f"those of the published Chinese inventory, as {section.pieces} is not here"
    return count + pad, f"all pieces of {section.pieces}, at most"


def _is_of_recipe(folder: Path, recipe: Recipe, sections: Sequence[str]) -> bool:
    """Whether a run's folder was made by these sections of the recipe."""
    if not (folder / "recipe.json").is_file():
        return False
    before, now = read_json(folder / "recipe.json")["recipe"], recipe.model_dump(mode="json")
    return all(before.get(name) == now[name] for name in sections)


def _dialogue_rows(recipe: Recipe, folder: Path | None) -> RowFacts:
    found = _tokenised(recipe, folder, "train")
    if found is not None:
        return found
    longest = recipe.data.max_tokens
    parts = [_source_facts(source) for source in recipe.data.sources]
    num_rows = sum(part[0] for part in parts)
    tokens = sum(count * min(length, longest) for count, length, _, _ in parts) / num_rows
    share = sum(count * share for count, _, share, _ in parts) / num_rows
    shared = SHARED_TOKENS if recipe.data.template in ("card", "alpaca") else 1
    told = "; ".join(dict.fromkeys(part[3] for part in parts))
    source = f"{_counts_told(num_rows, tokens, share)}: estimated, nothing is tokenised yet ({told})"
    return estimated_rows(num_rows, max(tokens, shared + 8), share, shared, longest, source)


def _tokenised(recipe: Recipe, folder: Path | None, name: str) -> RowFacts | None:
    """Rows of the run's folder, where they were made by this recipe."""
    if folder is None or not (folder / "3-data" / "done.json").is_file():
        return None
    path = folder / "3-data" / name
    if not path.is_dir() or not _is_of_recipe(folder, recipe, ("base", "tokenizer", "data")):
        return None
    facts = facts_of(TokenRows.load(path), "")
    share = facts.mean_labels / facts.mean_tokens
    told = f"{_counts_told(facts.num_rows, facts.mean_tokens, share)}: tokenised in {path}"
    return replace(facts, source=told)


def _counts_told(num_rows: int, tokens: float, share: float) -> str:
    return f"{num_rows:,} of {tokens:.0f} tokens on average, {share:.0%} of them answer"


def _source_facts(source: Source) -> tuple[int, float, float, str]:
    """Rows, tokens of one, share of labels, and how that is known."""
    path = Path(source.path)
    if not has_files(path):
        rows = source.sample or UNKNOWN_ROWS
        known = "" if source.sample else f", {UNKNOWN_ROWS:,} rows assumed"
        return rows, BELLE_TOKENS, BELLE_LABEL_SHARE, f"{path.name} is not here: lengths as of BELLE{known}"
    reading = read_source(source, is_first_look=True)
    asked = answered = 0.0
    for conversation in reading.conversations:
        for message in conversation.messages:
            tokens = _tokens_of(message.content)
            asked, answered = (asked, answered + tokens) if message.role == "assistant" else (asked + tokens, answered)
    count = max(len(reading.conversations), 1)
    tokens = (asked + answered) / count + TEMPLATE_TOKENS + 1
    total = _num_rows(source)
    rows = min(source.sample or total, total)
    return rows, tokens, (answered / count + 1) / tokens, f"characters of the first rows of {path.name}"


def _tokens_of(text: str) -> float:
    """Tokens of a text after a graft: 1.5 characters each where they are not ASCII, 4 where they are. An estimate."""
    plain = sum(character.isascii() for character in text)
    return plain / 4 + (len(text) - plain) / 1.5


def _num_rows(source: Source) -> int:
    total = 0
    for file in open_files(source.path):
        path = Path(file.name)
        if file.num_rows is not None:
            total += file.num_rows
        elif path.is_file() and path.stat().st_size > COUNTED_BYTES:
            total += path.stat().st_size // 500
        else:
            total += sum(1 for _ in file.rows)
    return max(total, 1)


def _text_rows(recipe: Recipe, folder: Path | None) -> RowFacts:
    found = _tokenised(recipe, folder, "text")
    paths = [source.path for source in recipe.data.text]
    return found or _plain_rows(paths, recipe.data.max_tokens)


def _scratch_rows(scratch: Scratch) -> RowFacts:
    return _plain_rows(scratch.text, scratch.row_tokens)


def _plain_rows(paths: Sequence[str], row_tokens: int) -> RowFacts:
    """Rows of plain text: nearly full, every token a target."""
    num_bytes = sum(_sizes(paths))
    tokens = num_bytes / 4 if num_bytes else UNKNOWN_ROWS * row_tokens
    num_rows = max(1, round(tokens / row_tokens))
    told = f"{num_rows:,}, {row_tokens} tokens each, all learned: estimated from the files' size, 4 bytes a token"
    return RowFacts(num_rows, ((row_tokens, row_tokens - 1),), row_tokens, 0, told)


def _sizes(paths: Sequence[str]) -> Iterator[int]:
    for path in map(Path, paths):
        files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else files_named(path)
        yield from (file.stat().st_size for file in files if file.is_file())
