"""Llama-3's rank file (`.tiktoken`): every token's bytes and its rank, and the exact `tokenizers` form of it.

Owns the file's format, the pattern that cuts words, and the special tokens that follow the ranks. Does not know folders
or grafts.

tiktoken joins any two neighbours that together are a token, lowest rank first, after looking the whole word up. Listing
every split of every token by the token's rank, with `ignore_merges`, gives the same.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from graftlm.errors import UserError
from graftlm.text.tokenizer.engines import CHAR_OF_BYTE

WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""How Llama-3 cuts a text into words before merging. Source: meta-llama/llama3, llama/tokenizer.py."""

SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{k}|>" for k in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{k}|>" for k in range(5, 251)),
)  # fmt: skip
"""The 256 control tokens whose ids follow the ranks. Source: the same file."""


NUM_RANKS = 128_000
"""Lines of the one rank file whose pattern and control tokens are known here."""


def is_rank_file(path: Path) -> bool:
    """Whether a file's first line is base64 and a number: ranks, and no SentencePiece model."""
    with path.open("rb") as file:
        fields = file.readline(400).split()
    return len(fields) == 2 and fields[1].isdigit()


def read_ranks(path: Path) -> dict[bytes, int]:
    """Rank by token. Raises UserError naming the line that is not base64 and the next rank, or the ranks missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            symbol = base64.b64decode(token, validate=True)
            if int(rank) != len(ranks) or symbol in ranks:
                raise ValueError(f"rank {int(rank)} where {len(ranks)} comes next")
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}:{number}: not a line of Llama-3's ranks, base64 and rank ({error}).",
                "Copy or download the file again.",
            ) from None
        ranks[symbol] = len(ranks)
    if len(ranks) != NUM_RANKS:
        raise UserError(
            f"{path}: {len(ranks):,} ranks, and Llama-3's file has {NUM_RANKS:,}; it is cut off or another model's.",
            "Copy or download it again; of another model give the tokenizer.json.",
        )
    return ranks


def build_fast_of_ranks(ranks: dict[bytes, int]) -> FastTokenizer:
    """The `tokenizers` form: control tokens after the ranks, beginning-of-text put before a text."""
    spelled = {symbol: "".join(CHAR_OF_BYTE[byte] for byte in symbol) for symbol in ranks}
    merges = []
    for whole, rank in ranks.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], spelled[left], spelled[right]))
    merges.sort()
    vocabulary = {spelled[symbol]: rank for symbol, rank in ranks.items()}
    fast = FastTokenizer(
        models.BPE(vocab=vocabulary, merges=[(left, right) for *_, left, right in merges], ignore_merges=True)
    )
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    begin = SPECIAL_TOKENS[0]
    fast.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, len(ranks))]
    )
    return fast
