"""Two small tokenizers, as Llama-2's and as Llama-3's, both with the control tokens of common chat templates."""

import json
from pathlib import Path

import pytest
from chat_templates import CONTROL_TOKENS
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from graftlm.text.tokenizer import Tokenizer, load_tokenizer, train_base_tokenizer

TEXTS = [f"line {i} of plain text, a question and its answer: ### Response:\n\nBelow 你好再见" for i in range(60)]


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece BPE with byte fallback, and the control tokens added to its `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("llama")
    train_base_tokenizer(TEXTS, 330, folder)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens(list(CONTROL_TOKENS))
    return _saved(fast, folder / "grown")


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with a pattern that keeps newlines together."""
    fast = FastTokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(TEXTS, trainer)
    return _saved(fast, tmp_path_factory.mktemp("bytes"))


@pytest.fixture(params=["llama", "bytes"])
def tokenizer(request: pytest.FixtureRequest, llama_tokenizer: Tokenizer, byte_tokenizer: Tokenizer) -> Tokenizer:
    """Either of the two."""
    return llama_tokenizer if request.param == "llama" else byte_tokenizer


def _saved(fast: FastTokenizer, folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(folder)
