"""Loading a tokenizer from whatever form a base comes in.

Owns the files: a folder, a `tokenizer.model`, a `tokenizer.json`, Llama-3's rank file, a hub id. Does not know what a
tokenizer does with text. Which control token begins, ends and pads is found here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from graftlm.errors import UserError
from graftlm.text.tokenizer.engines import Engine, FastEngine, SentencePieceEngine
from graftlm.text.tokenizer.ranks import build_fast_of_ranks, is_rank_file, read_ranks
from graftlm.text.tokenizer.sentencepiece_bpe import (
    CONTROL,
    UNKNOWN,
    ModelProto,
    build_fast,
    read_model,
    why_not_exact,
)
from graftlm.text.tokenizer.tokenizer import (
    CONFIG_FILE,
    EXPANSIONS_FILE,
    FAST_FILE,
    GRAFT_FILE,
    MODEL_FILE,
    ROLES,
    TEMPLATE_FILE,
    TOKENIZER_FILES,
    Tokenizer,
)

_USUAL_NAMES = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "unk_token": ("<unk>",),
    "pad_token": ("[PAD]", "<pad>", "<|pad|>"),
}


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder, a `.model`, `.json` or `.tiktoken` file, or a hub id.

    A folder's `tokenizer.json` is taken as it is. Where only a SentencePiece model or Llama-3's ranks lie, the exact
    fast form is built in memory; a model that has none (tied scores, Unigram) is encoded by SentencePiece itself.

    Raises:
        UserError: nothing usable is found, or a file is foreign or cut off.
    """
    path = Path(source)
    if path.is_file():
        return _load_file(path)
    path = find_folder(source)
    config = _read_json(path / CONFIG_FILE) or {}
    model_path, fast_path = path / MODEL_FILE, path / FAST_FILE
    model, engine = None, None
    if model_path.is_file() and not is_rank_file(model_path):
        model = read_model(model_path)
    if fast_path.is_file():
        engine = FastEngine(_read_fast(fast_path))
    elif model is not None:
        engine = _engine_of(model)
    elif model_path.is_file():
        engine = FastEngine(build_fast_of_ranks(read_ranks(model_path)))
    if engine is None:
        raise UserError(
            f"{path}: neither {FAST_FILE} nor {MODEL_FILE} is there.",
            "Give a folder that holds a tokenizer, or the path of a .model file.",
        )
    return Tokenizer(
        engine,
        roles=_find_roles(path, config, engine, model),
        model=model,
        config=config,
        chat_template=_read_template(path, config),
        graft=_read_json(path / GRAFT_FILE),
        expansions=_read_expansions(path),
    )


def find_folder(source: str | Path) -> Path:
    """The folder of a tokenizer: the path itself, or where a hub id's files were fetched to. Raises UserError."""
    path = Path(source)
    return path if path.is_dir() else _fetch(str(source))


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
    if is_rank_file(path):
        engine = FastEngine(build_fast_of_ranks(read_ranks(path)))
        return Tokenizer(engine, roles=_find_roles(None, {}, engine, None))
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
    for role in ROLES:
        given = in_config.get(role)
        name = given.get("content") if isinstance(given, dict) else given
        if not isinstance(name, str):
            name = from_model.get(role) or next((usual for usual in _USUAL_NAMES[role] if usual in known), None)
        if name is not None:
            roles[role] = name
    return roles
