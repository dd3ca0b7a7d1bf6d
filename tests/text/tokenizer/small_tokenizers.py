"""Small tokenizers and texts that the tests of grafts are built from, all made in process."""

import base64
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from graftlm.text.tokenizer.ranks import WORD_PATTERN

ENGLISH = [
    f"Plain text number {i}, with words in it: the {w} sat on the mat." for i in range(40) for w in ("cat", "hen")
]

WORDS = {
    "Han": "今天 天气 很好 明天 我们 公园 下雨 再去 预报 学习 中文 老师 喜欢 欢喜 朋友 问题 回答 哈哈哈",
    "Japanese": "今日 は 天気 が いい です ね コンピューター ゲーム を します 日本語 勉強 ーー たべもの すごーい",
    "Arabic": "السلام عليكم مرحبا بالعالم كتاب الطالب يقرأ في المدرسة اليوم الجو جميل مـدرسة مَدرسة",
    "Devanagari": "नमस्ते दुनिया आज मौसम अच्छा है विद्यार्थी पुस्तक पढ़ता हिन्दी भाषा सीखना क्या",
}
SCRIPTS = {
    "Han": ("Han",),
    "Japanese": ("Han", "Hiragana", "Katakana"),
    "Arabic": ("Arabic",),
    "Devanagari": ("Devanagari",),
}
"""Unicode scripts by the names of `WORDS`."""


def sentences(language: str, num_sentences: int = 120, seed: int = 0) -> list[str]:
    """Sentences of random words: joined by spaces where the language does so, with English and digits between."""
    dice = random.Random(seed)
    words = WORDS[language].split()
    between = " " if language in ("Arabic", "Devanagari") else ""
    found = []
    for number in range(num_sentences):
        text = between.join(dice.choices(words, k=dice.randint(3, 9)))
        found.append(f"{text}. Plain text {number}" if number % 5 == 0 else text)
    return found


def write_lines(path: Path, lines: list[str]) -> str:
    """Write a text file of one line each; gives its path as a recipe holds it."""
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def train_byte_level(folder: Path, texts: list[str], num_pieces: int = 420, *, is_qwen_like: bool = False) -> Path:
    """A byte-level base: Llama-3-like (words looked up whole), or Qwen-like (NFC, added tokens that are no control)."""
    fast = FastTokenizer(models.BPE(ignore_merges=not is_qwen_like))
    if is_qwen_like:
        fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=num_pieces, initial_alphabet=alphabet, show_progress=False)
    )
    names = (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if is_qwen_like else ["<|begin_of_text|>", "<|end_of_text|>"]
    )
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if is_qwen_like:
        fast.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    folder.mkdir(parents=True)
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[0] if is_qwen_like else names[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def learn_ranks(texts: list[str], num_ranks: int) -> dict[bytes, int]:
    """Ranks by the plainest byte-pair learning: count all pairs anew and join the most frequent."""
    words = Counter(word for text in texts for word in regex.findall(WORD_PATTERN, text))
    spelled = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < num_ranks:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        for word, parts in spelled.items():
            spelled[word] = join_by_rank(parts, {best[0] + best[1]: 0})
    return ranks


def join_by_rank(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's rule in its plainest form: while two neighbours together have a rank, join the lowest, leftmost."""
    parts = list(parts)
    while True:
        found = [(ranks[a + b], k) for k, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return parts
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    """Write Llama-3's file format."""
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
