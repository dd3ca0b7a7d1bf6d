"""The tokenizer everything else uses: text to ids and back, saved to a folder.

Owns which control token means what, what a graft added (`expansions`), and the files of a tokenizer folder; `load.py`
reads them. Does not know how pieces are learned or proved, nor chat formats. Control-token strings in a text stay
text: only `special_tokens` gives their ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.text.tokenizer.engines import Engine, FastEngine
from graftlm.text.tokenizer.sentencepiece_bpe import ModelProto

FAST_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GRAFT_FILE = "graft.json"
EXPANSIONS_FILE = "expansions.json"
TOKENIZER_FILES = (FAST_FILE, MODEL_FILE, CONFIG_FILE, TEMPLATE_FILE, GRAFT_FILE, EXPANSIONS_FILE)

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`; immutable after that.

    Attributes: `num_pieces` (number of ids, control tokens included), `bos_id`, `eos_id`, `pad_id`, `unk_id`,
    `special_tokens` (name to id), `special_ids`, `expansions` (new id to the base's ids), `first_new_id`,
    `chat_template`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        roles: dict[str, str],
        model: ModelProto | None = None,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        graft: dict[str, Any] | None = None,
        expansions: dict[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.config = config or {}
        self.roles = roles
        self.num_pieces = engine.num_pieces
        self.special_ids = engine.special_ids
        self.special_tokens = {engine.piece(piece_id): piece_id for piece_id in sorted(engine.special_ids)}
        self.bos_id = self._id_of("bos_token")
        self.pad_id = self._id_of("pad_token")
        self.unk_id = self._id_of("unk_token")
        eos_id = self._id_of("eos_token")
        if eos_id is None:
            raise UserError(
                f"The tokenizer names no end-of-text token; its control tokens are {list(self.special_tokens)}.",
                f'Write "eos_token": "…" into its {CONFIG_FILE}.',
            )
        self.eos_id: int = eos_id
        self.chat_template = chat_template
        self.graft = graft
        self.expansions: dict[int, tuple[int, ...]] = expansions or {}
        self.first_new_id: int | None = None if graft is None else graft["first_new_id"]

    def _id_of(self, role: str) -> int | None:
        name = self.roles.get(role)
        if name is None:
            return None
        if name not in self.special_tokens:
            raise UserError(
                f"The tokenizer's {role} is {name!r}, which is none of its control tokens {list(self.special_tokens)}.",
                f"Correct {role} in {CONFIG_FILE}.",
            )
        return self.special_tokens[name]

    @property
    def has_fast_form(self) -> bool:
        """Whether a `tokenizer.json` encodes exactly as this tokenizer does."""
        return isinstance(self.engine, FastEngine)

    @property
    def is_byte_level(self) -> bool:
        """Whether the pieces are strings of bytes (GPT-2, Llama-3, Qwen) and not of characters."""
        return isinstance(self.engine, FastEngine) and self.engine.is_byte_level

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides how a text is encoded."""
        return hashlib.sha256(self.engine.definition().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no control tokens added. Raises UserError on lone surrogates."""
        return self.engine.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows a newline: no space is put before it. Raises UserError as `encode`."""
        return self.engine.encode_continuation(text)

    def encode_continuations(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode_continuation` of every text, on all cores. Raises UserError as `encode`."""
        return self.engine.encode_continuations(list(texts))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` of every text, on all cores. Raises UserError as `encode`."""
        return self.engine.encode_batch(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids that came from `encode`; control tokens are left out, broken bytes become U+FFFD."""
        return self.engine.decode(ids)

    def decode_continuation(self, ids: Sequence[int]) -> str:
        """The text of ids that came from `encode_continuation`: a leading space is kept."""
        return b"".join(self.token_bytes(piece_id) for piece_id in ids).decode(errors="replace")

    def piece(self, piece_id: int) -> str:
        """The piece of an id as the vocabulary spells it. Raises IndexError for an id without a piece."""
        return self.engine.piece(piece_id)

    def has_piece(self, piece_id: int) -> bool:
        """Whether an id stands for something; a byte-level vocabulary may leave ids out."""
        try:
            self.engine.piece(piece_id)
        except IndexError:
            return False
        return True

    def name_of(self, piece_id: int) -> str:
        """What an id is called in a message: its text, else its piece; empty where it stands for nothing."""
        if not self.has_piece(piece_id):
            return ""
        return self.decode_continuation([piece_id]) or self.piece(piece_id)

    @cached_property
    def piece_ids(self) -> list[int]:
        """All ids that stand for something, in order."""
        return [piece_id for piece_id in range(self.num_pieces) if self.has_piece(piece_id)]

    def token_bytes(self, piece_id: int) -> bytes:
        """The UTF-8 bytes an id stands for, possibly part of a character; none for a control token."""
        return self.engine.token_bytes(piece_id)

    def expand(self, ids: Iterable[int]) -> list[int]:
        """The base tokenizer's ids for the same text: every new id replaced by its expansion."""
        expansions = self.expansions
        return [old_id for piece_id in ids for old_id in expansions.get(piece_id, (piece_id,))]

    def grafted(
        self, engine: Engine, expansions: dict[int, tuple[int, ...]], pad: str | None, model: ModelProto | None = None
    ) -> Tokenizer:
        """This tokenizer with pieces added: `engine` and `model` hold them, `pad` is a new control token's name."""
        return Tokenizer(
            engine,
            roles={**self.roles, **({"pad_token": pad} if pad else {})},
            model=model,
            config=self.config,
            chat_template=self.chat_template,
            graft={"first_new_id": self.num_pieces},
            expansions=expansions,
        )

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Write the tokenizer's files into `folder`, so that `load_tokenizer` and `AutoTokenizer` read them.

        `chat_template` replaces the tokenizer's own. A tokenizer without an exact fast form is written for
        transformers' SentencePiece backend.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, str | bytes | None] = {
            FAST_FILE: self.engine.fast.to_str(pretty=False) if isinstance(self.engine, FastEngine) else None,
            MODEL_FILE: self.model.SerializeToString() if self.model is not None else None,
            CONFIG_FILE: _to_json(self._config_to_save()),
            TEMPLATE_FILE: chat_template if chat_template is not None else self.chat_template,
            GRAFT_FILE: None if self.graft is None else _to_json(self.graft),
            EXPANSIONS_FILE: json.dumps({str(new): old for new, old in self.expansions.items()}) or None,
        }
        if not self.expansions:
            files[EXPANSIONS_FILE] = None
        for name, content in files.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))

    def _config_to_save(self) -> dict[str, Any]:
        kept = {key: self.config[key] for key in ("model_max_length",) if key in self.config}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast" if self.has_fast_form else "SentencePieceBackend",
            **{role: self.roles[role] for role in ROLES if role in self.roles},
            "clean_up_tokenization_spaces": False,
            **kept,
        }
        if not self.has_fast_form:
            config["legacy"] = True  # transformers' word for: keep the space before the text
        return config


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
