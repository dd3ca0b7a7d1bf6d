"""The finished model as others load it: a plain Hugging Face folder, an adapter for plain PEFT, a GGUF file.

Owns what stands beside the weights (tokenizer with its chat template, generation settings), and the comparison of what
was written with what was trained. Holds one tensor of a model at a time. Does not train, evaluate or describe. On the
road: `N-model`.

Shapes: T tokens, V rows of the head.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from torch import Tensor
from torch.nn.functional import linear
from transformers import GenerationConfig

from graftlm.errors import UserError
from graftlm.model.causal import (
    body_of,
    check_ids,
    empty_causal,
    head_weight,
    load_causal,
    model_fingerprint,
    plain_model,
)
from graftlm.model.lora import load_adapter, save_adapter
from graftlm.model.tensors import TensorSource, source_of_folder, streamed_logits, write_source
from graftlm.model.weights import stored_tensors, tensor_sha256, write_folder
from graftlm.release.gguf_file import Quantization, source_of_gguf, write_gguf
from graftlm.release.gguf_vocabulary import add_vocabulary
from graftlm.release.logit_distance import LogitDistance, distance_of
from graftlm.run import disk_errors, say
from graftlm.talk.generate import stop_ids_of
from graftlm.text.dialogue import BUILT_IN, CARD, Conversation, Message, Template, render_or_tell
from graftlm.text.tokenizer import Tokenizer, load_tokenizer

# Merged = adapter within 1e-4 (N4) holds for weights stored as they were trained.
EXACT_TOLERANCE = 1e-4
MAX_SHARD_BYTES = 5 * 10**9
_MAX_COMPARED_TOKENS = 512
SAMPLES = (
    Conversation((Message("user", "What is the capital of France?"), Message("assistant", "It is Paris."))),
    Conversation((Message("user", "12 + 30 = ?"), Message("assistant", "42"))),
    Conversation((Message("user", "中国的首都是哪里？"), Message("assistant", "北京是中国的首都。"))),
)

Also = Callable[[Path], None]
"""Writes more files into the folder being made, before its manifest."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export wrote: sha256 by file, and how far its re-loaded logits lie from the trained model's
    (`LogitDistance`); `folder` is where it lies once it is whole.

    With 16 or 8 bits the distance is that of rounding, which depends on the model and has no bound of its own; that
    nothing but rounding changed is checked tensor by tensor.
    """

    files: dict[str, str]
    max_logit_difference: float
    dtype: str
    num_compared_tokens: int
    mean_divergence: float
    num_likeliest_changed: int
    folder: str = ""


def export_model(
    source: TensorSource,
    tokenizer: Tokenizer,
    template_jinja: str,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    samples: Sequence[Conversation] = SAMPLES,
    also: Also | None = None,
) -> Manifest:
    """Write a trained model for everyone to load.

    The folder is read again: every tensor must be the trained one rounded to `dtype`, embedding and head
    included, and the logits on rendered `samples` are compared. Raises UserError, NumericalStop, DiskError.
    """
    out = Path(out)
    check_ids(source.config, tokenizer.num_pieces)
    rows = sample_rows(samples, tokenizer, template_of(template_jinja))
    digests: dict[str, str] = {}

    def write(scratch: Path) -> None:
        digests.update(write_source(source, scratch, dtype, max_shard_bytes))
        settings = generation_settings(source.config.vocab_size, tokenizer, template_of(template_jinja))
        _finished_config(source, tokenizer, settings, dtype).save_pretrained(scratch)
        settings.save_pretrained(scratch)
        tokenizer.save(scratch, chat_template=template_jinja)
        if also is not None:
            also(scratch)

    files = write_folder(out, write)
    _check_tokenizer(out, tokenizer, template_jinja)
    loaded = source_of_folder(out)
    stored = {name: tensor_sha256(tensor) for name, tensor in stored_tensors(out).items()}
    assert stored == digests, f"tensors changed on disk: {sorted(stored.items() ^ digests.items())[:1]}"
    distance = distance_of(streamed_logits(source, rows), streamed_logits(loaded, rows))
    if dtype == torch.float32:
        assert distance.largest <= EXACT_TOLERANCE, f"merged logits lie {distance.largest} from the trained ones"
    return _manifest(files, str(dtype).removeprefix("torch."), rows, distance)


def export_adapter(
    model: Any,
    tokenizer: Tokenizer,
    template_jinja: str,
    out: str | Path,
    base: str | Path,
    base_name: str | Path | None = None,
    *,
    samples: Sequence[Conversation] = SAMPLES,
    also: Also | None = None,
) -> Manifest:
    """Write the adapters of a trained model, and its embedding and head if they learned, for plain PEFT on
    `base`, which the adapter calls `base_name`.

    Loaded again on `base`, the logits must be the trained model's within 1e-4. Raises UserError, DiskError.
    """
    check_ids(plain_model(model), tokenizer.num_pieces)
    rows = sample_rows(samples, tokenizer, template_of(template_jinja))
    trained_logits = [_logits_TV(model, ids) for ids in rows]

    def carry(scratch: Path) -> None:
        tokenizer.save(scratch, chat_template=template_jinja)
        if also is not None:
            also(scratch)

    files = save_adapter(model, out, base_name or base, model_fingerprint(base), also=carry)
    _check_tokenizer(Path(out), tokenizer, template_jinja)
    loaded_base: Any = load_causal(base)
    loaded = load_adapter(loaded_base.to(plain_model(model).device), out)
    distance = distance_of(trained_logits, [_logits_TV(loaded, ids) for ids in rows])
    assert distance.largest <= EXACT_TOLERANCE, f"the re-loaded adapter's logits lie {distance.largest} apart"
    return _manifest(files, "float32", rows, distance)


def export_gguf(
    source: TensorSource,
    tokenizer: Tokenizer,
    template_jinja: str,
    out: str | Path,
    *,
    name: str,
    quantization: Quantization = "f16",
    samples: Sequence[Conversation] = SAMPLES,
    also: Also | None = None,
) -> Manifest:
    """Write a trained model as one GGUF file for llama.cpp, `NAME-f16.gguf` or `NAME-q8_0.gguf`, in folder `out`.

    The file is read again, its tensors put back into our form, and the logits on rendered `samples` compared.
    Raises UserError, NumericalStop, DiskError.
    """
    out = Path(out)
    check_ids(source.config, tokenizer.num_pieces)
    template, num_pieces = template_of(template_jinja), tokenizer.num_pieces
    rows = sample_rows(samples, tokenizer, template)
    digests: dict[str, str] = {}
    file = f"{name}-{quantization}.gguf"

    def add_more(writer: GGUFWriter) -> None:
        writer.add_name(name)
        add_vocabulary(writer, tokenizer, template, sorted(stop_ids_of(tokenizer, template)))

    def write(scratch: Path) -> None:
        digests.update(write_gguf(source, scratch / file, quantization, num_pieces, add_more))
        if also is not None:
            also(scratch)

    files = write_folder(out, write)
    loaded, stored = source_of_gguf(out / file, source.config, num_pieces)
    assert stored == digests, f"tensors changed on disk: {sorted(stored.items() ^ digests.items())[:1]}"
    trained = [logits_TV[:, :num_pieces] for logits_TV in streamed_logits(source, rows)]
    return _manifest(files, quantization, rows, distance_of(trained, streamed_logits(loaded, rows)))


def _manifest(files: dict[str, str], dtype: str, rows: Sequence[list[int]], distance: LogitDistance) -> Manifest:
    return Manifest(
        files, distance.largest, dtype, sum(map(len, rows)), distance.mean_divergence, distance.num_likeliest_changed
    )


def export_gguf_of_folder(folder: Path, out: Path, quantization: Quantization) -> Manifest:
    """Write the GGUF file of a plain model folder with a tokenizer; without a chat template it gets the card's.

    Raises UserError on anything amiss in the folder, before anything is written.
    """
    tokenizer = load_tokenizer(folder)
    check_ids(empty_causal(folder), tokenizer.num_pieces)
    template = tokenizer.chat_template or CARD.jinja
    if not tokenizer.chat_template:
        say(f"{folder} carries no chat template: the card's is used.")
    name = folder.absolute().name
    return export_gguf(source_of_folder(folder), tokenizer, template, out, name=name, quantization=quantization)


def whole_or_absent(out: Path, write: Callable[[Path], Manifest]) -> Manifest:
    """Let `write` make and check an export in a folder beside `out`, then give it that name by one rename.

    What an interrupted export left is cleared away. Raises UserError when `out` already holds something.
    """
    out = out.absolute()
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already holds files.", "Give --out a new or empty folder.")
    scratch = out.with_name(f".{out.name}.unchecked")
    with disk_errors(out.parent):
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            manifest = write(scratch)
            scratch.replace(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return replace(manifest, folder=str(out))


def generation_settings(num_rows: int, tokenizer: Tokenizer, template: Template) -> GenerationConfig:
    """How others generate by default: it stops where an answer of the template ends, and never samples
    nothing.

    Suppressed are rows beyond the tokenizer (padding no training moved, which may win all the same) and the
    control pieces that begin, pad or stand for the unknown.
    """
    ends = sorted(stop_ids_of(tokenizer, template))
    silent = {i for i in (tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id) if i is not None} - set(ends)
    never = sorted(silent | set(range(tokenizer.num_pieces, num_rows)))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_id,
        suppress_tokens=never or None,
        do_sample=False,
    )


def template_of(jinja: str) -> Template:
    """The built-in template of that text, or one made of it."""
    return next((t for t in BUILT_IN.values() if t.jinja == jinja), Template("exported", jinja, "all"))


def sample_rows(samples: Sequence[Conversation], tokenizer: Tokenizer, template: Template) -> list[list[int]]:
    """Rendered ids of each sample, cut where comparing them would take long. Raises UserError."""
    return [render_or_tell(sample, tokenizer, template).ids[:_MAX_COMPARED_TOKENS] for sample in samples]


def _finished_config(source: TensorSource, tokenizer: Tokenizer, settings: GenerationConfig, dtype: torch.dtype) -> Any:
    config: Any = copy.deepcopy(source.config)
    config.architectures = [type(empty_causal(source.config)).__name__]
    config.dtype = dtype
    config.eos_token_id = settings.eos_token_id
    config.bos_token_id, config.pad_token_id = tokenizer.bos_id, tokenizer.pad_id
    return config


@torch.no_grad()
def _logits_TV(model: Any, ids: list[int]) -> Tensor:
    """Logits in fp32, dropout off."""
    was_training = model.training
    model.eval()
    weight = head_weight(model)
    hidden_TH = body_of(model)(torch.tensor([ids], device=weight.device), use_cache=False).last_hidden_state[0]
    model.train(was_training)
    return linear(hidden_TH, weight).float()


def _check_tokenizer(out: Path, tokenizer: Tokenizer, template_jinja: str) -> None:
    loaded = load_tokenizer(out)
    assert loaded.fingerprint == tokenizer.fingerprint, "the exported tokenizer encodes differently"
    assert loaded.chat_template == template_jinja, "the exported chat template differs"
