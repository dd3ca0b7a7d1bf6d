"""The tokenizer everything else uses: text to ids and back, loaded from and saved to a folder.

Owns which control token means what, what a graft added (`expansions`), and the files of a tokenizer folder.
Does not know how pieces are learned or proved, nor chat formats. Control-token strings in a text stay text:
only `special_tokens` gives their ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from graftlm.errors import UserError
from graftlm.text.tokenizer.engines import Engine, FastEngine, SentencePieceEngine
from graftlm.text.tokenizer.sentencepiece_bpe import (
    CONTROL,
    UNKNOWN,
    ModelProto,
    build_fast,
    parse_model,
    read_model,
    why_not_exact,
)

FAST_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GRAFT_FILE = "graft.json"
EXPANSIONS_FILE = "expansions.json"
TOKENIZER_FILES = (FAST_FILE, MODEL_FILE, CONFIG_FILE, TEMPLATE_FILE, GRAFT_FILE, EXPANSIONS_FILE)

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_USUAL_NAMES = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "unk_token": ("<unk>",),
    "pad_token": ("[PAD]", "<pad>", "<|pad|>"),
}


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

    def token_bytes(self, piece_id: int) -> bytes:
        """The UTF-8 bytes an id stands for, possibly part of a character; none for a control token."""
        return self.engine.token_bytes(piece_id)

    def expand(self, ids: Iterable[int]) -> list[int]:
        """The base tokenizer's ids for the same text: every new id replaced by its expansion."""
        expansions = self.expansions
        return [old_id for piece_id in ids for old_id in expansions.get(piece_id, (piece_id,))]

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
            **{role: self.roles[role] for role in _ROLES if role in self.roles},
            "clean_up_tokenization_spaces": False,
            **kept,
        }
        if not self.has_fast_form:
            config["legacy"] = True  # transformers' word for: keep the space before the text
        return config


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a `tokenizer.model` or `tokenizer.json` file, or a hub id.

    A folder's `tokenizer.json` is taken as it is. Where only a SentencePiece model lies, its exact fast form is
    built in memory; if it has none (tied scores, Unigram), SentencePiece itself encodes.

    Raises:
        UserError: nothing usable is found, or a file is foreign or cut off.
    """
    path = Path(source)
    if path.is_file():
        return _load_file(path)
    if not path.is_dir():
        path = _fetch(str(source))
    config = _read_json(path / CONFIG_FILE) or {}
    graft, expansions = _read_json(path / GRAFT_FILE), _read_expansions(path)
    template = _read_template(path, config)
    model_path, fast_path = path / MODEL_FILE, path / FAST_FILE
    model = None
    if model_path.is_file() and not (fast_path.is_file() and _is_tiktoken(model_path)):
        model = read_model(model_path)
    if fast_path.is_file():
        engine: Engine = FastEngine(_read_fast(fast_path))
    elif model is not None:
        engine = _engine_of(model)
    else:
        raise UserError(
            f"{path}: neither {FAST_FILE} nor {MODEL_FILE} is there.",
            "Give a folder that holds a tokenizer, or the path of a .model file.",
        )
    return Tokenizer(
        engine,
        roles=_find_roles(path, config, engine, model),
        model=model,
        config=config,
        chat_template=template,
        graft=graft,
        expansions=expansions,
    )


def tokenizer_of_model(model: ModelProto) -> Tokenizer:
    """A tokenizer from a parsed SentencePiece model."""
    engine = _engine_of(model)
    return Tokenizer(engine, roles=_find_roles(None, {}, engine, model), model=model)


def _engine_of(model: ModelProto) -> Engine:
    return SentencePieceEngine(model) if why_not_exact(model) else FastEngine(build_fast(model))


def _load_file(path: Path) -> Tokenizer:
    if path.suffix == ".json":
        engine = FastEngine(_read_fast(path))
        return Tokenizer(engine, roles=_find_roles(path.parent, {}, engine, None))
    return tokenizer_of_model(read_model(path))


def _fetch(name: str) -> Path:
    """Download the tokenizer files of a hub id; a local path that is missing ends here too."""
    from huggingface_hub import snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    looks_like_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not looks_like_id:
        raise UserError(
            f"{name}: no such file or folder, and not a hub id (OWNER/NAME) either.",
            "Give the path of a folder that holds tokenizer.json or tokenizer.model.",
        )
    patterns = [*TOKENIZER_FILES, "special_tokens_map.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:  # the hub client raises many unrelated kinds
        raise UserError(
            f"{name}: no such folder here, and it could not be fetched as a hub id ({type(error).__name__}).",
            "Check the path, or the id and the network; a gated model needs `hf auth login`.",
        ) from error


def _is_tiktoken(path: Path) -> bool:
    """Whether a `tokenizer.model` is Llama-3's text file of byte ranks and not a SentencePiece model."""
    with path.open("rb") as file:
        fields = file.readline(200).split()
    return len(fields) == 2 and fields[1].isdigit()


def _read_fast(path: Path) -> FastTokenizer:
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(
            f"{path}: not a whole tokenizer.json ({error}).",
            "Copy or download it again, or remove it if a tokenizer.model lies beside it.",
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, expected an object")
        return content
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).", "Restore the file from where it came.") from error


def _read_expansions(folder: Path) -> dict[int, tuple[int, ...]]:
    content = _read_json(folder / EXPANSIONS_FILE) or {}
    return {int(new): tuple(old) for new, old in content.items()}


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _find_roles(
    folder: Path | None, config: dict[str, Any], engine: Engine, model: ModelProto | None
) -> dict[str, str]:
    """Which control token begins, ends and pads: from the folder's files, else the model, else usual names."""
    in_config = dict(config)
    if folder is not None:
        in_config = {
            **(_read_json(folder / "special_tokens_map.json") or {}),
            **(_read_json(folder / CONFIG_FILE) or {}),
            **config,
        }
    known = {engine.piece(piece_id) for piece_id in engine.special_ids}
    from_model: dict[str, str] = {}
    if model is not None:
        trainer = model.trainer_spec
        kinds = {piece.piece: piece.type for piece in model.pieces}
        named = {
            "bos_token": trainer.bos_piece,
            "eos_token": trainer.eos_piece,
            "unk_token": trainer.unk_piece,
            "pad_token": trainer.pad_piece,
        }
        from_model = {role: name for role, name in named.items() if kinds.get(name) in (CONTROL, UNKNOWN)}
    roles: dict[str, str] = {}
    for role in _ROLES:
        given = in_config.get(role)
        name = given.get("content") if isinstance(given, dict) else given
        if not isinstance(name, str):
            name = from_model.get(role) or next((usual for usual in _USUAL_NAMES[role] if usual in known), None)
        if name is not None:
            roles[role] = name
    return roles


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


__all__ = ["TOKENIZER_FILES", "Tokenizer", "load_tokenizer", "parse_model", "tokenizer_of_model"]
