"""Load, build and save a causal language model: the only file naming AutoModelForCausalLM.

Owns which models are understood (Llama and its twins in shape), what is refused before loading, and the two
handles training needs: the body that turns ids into hidden states and the matrix that turns those into
logits. Does not know tokenizers, adapters or training. On the road: `2-base` and every stage load and save
through here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from graftlm.errors import UserError
from graftlm.model.weights import (
    StoredTensor,
    model_fingerprint,
    read_model_config,
    stored_tensors,
    tensor_sha256,
    verify_manifest,
    write_folder,
)
from graftlm.run import say

__all__ = [
    "body_of", "causal_of", "check_folder", "check_ids", "empty_causal", "find_model", "head_weight", "is_tied",
    "load_causal", "model_fingerprint", "new_causal", "parameter_count", "plain_model", "recompute_activations",
    "save_causal", "vocabulary_modules",
]  # fmt: skip

# Pre-norm decoders with RMSNorm whose logits are exactly hidden @ head.T: no soft cap, no scale after it.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # buffers that old releases of transformers wrote into checkpoints


def find_model(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model: itself, or fetched from the hub (weights in safetensors and text files
    only).

    Raises UserError when there is no such folder and the hub cannot give it.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.is_file():
        raise UserError(
            f"{folder} is a GGUF file, which llama.cpp reads, and no model folder.",
            "Give the run's folder or its N-model; with this file: llama-cli -m FILE --jinja -cnv.",
        )
    if folder.exists() or not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise UserError(
            f"There is no model folder {path_or_hub_id}.", "Give the path of a folder, or a hub id NAME/MODEL."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{path_or_hub_id} is neither a folder here nor to be had from the hub ({type(error).__name__}).",
            "Check the name and the connection, or download it elsewhere and give the folder's path.",
        ) from None


def load_causal(
    path_or_hub_id: str | Path, dtype: torch.dtype | None = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A causal LM from a folder or hub id, every tensor checked to be there before any is read.

    `dtype` None keeps the dtype the weights are stored in.

    Raises UserError on a folder without config, a model that is not Llama-like, pickled, quantised, missing,
    foreign, truncated or changed weights, and shards outside the folder. Code lying in the folder never runs.
    """
    folder, config, _ = check_folder(path_or_hub_id)
    transformers_logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype or "auto", attn_implementation=attention, use_safetensors=True,
        trust_remote_code=False, local_files_only=True, output_loading_info=True,
    )  # fmt: skip
    model, info = loaded
    assert not info["missing_keys"], info["missing_keys"]  # _check_tensors knows better than to get here
    return _without_padding_index(model)


def check_folder(path_or_hub_id: str | Path) -> tuple[Path, PretrainedConfig, dict[str, StoredTensor]]:
    """A model's folder, its config and where its tensors lie, once all of it is found whole and of one model.

    Raises UserError as `load_causal`.
    """
    folder = find_model(path_or_hub_id)
    config = _checked_config(folder)
    tensors = stored_tensors(folder)
    verify_manifest(folder)
    _check_tensors(folder, config, tensors)
    return folder, config, tensors


def empty_causal(config_or_path: PretrainedConfig | str | Path) -> PreTrainedModel:
    """The model a config describes, on the meta device: shapes without numbers, for counting and planning."""
    config = config_or_path
    if not isinstance(config, PretrainedConfig):
        config = _checked_config(find_model(config))
    with torch.device("meta"):
        return _without_padding_index(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def new_causal(
    *,
    num_rows: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    intermediate_size: int,
    is_tied: bool = False,
    max_positions: int = 2048,
    rope_theta: float = 10_000.0,
    bos_id: int | None = 1,
    eos_id: int = 2,
    seed: int = 0,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """A Llama of the given geometry with freshly drawn fp32 weights; the same seed draws the same weights."""
    if hidden_size % num_heads:
        raise UserError(
            f"hidden_size {hidden_size} does not divide into {num_heads} heads.", "Choose a multiple of num_heads."
        )
    config = LlamaConfig(
        vocab_size=num_rows, hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads or num_heads, intermediate_size=intermediate_size,
        tie_word_embeddings=is_tied, max_position_embeddings=max_positions, bos_token_id=bos_id, eos_token_id=eos_id,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, rms_norm_eps=1e-5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return _without_padding_index(model)


def causal_of(config: Mapping[str, Any], attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM of a config in plain values, in fp32, its weights still to be filled in."""
    values = dict(config)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation=attention)
    return _without_padding_index(model)


def save_causal(
    model: PreTrainedModel,
    folder: str | Path,
    max_shard: str = "5GB",
    also: Callable[[Path], None] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, str]:
    """Write a plain model with a manifest, whole or not at all; returns sha256 by file.

    `also` writes more files beside it; weights are rounded to `dtype` on disk only, the model keeps its own.
    Raises DiskError when the disk is full, read-only or broken.
    """
    assert not hasattr(model, "peft_config"), "merge the adapter before saving a plain model"
    assert not any("parametrizations" in name for name, _ in model.named_parameters()), "join the rows first"

    transformers_logging.disable_progress_bar()

    def write(scratch: Path) -> None:
        with _weights_as(model, dtype or model.dtype):
            model.save_pretrained(scratch, max_shard_size=max_shard)
        if also is not None:
            also(scratch)

    return write_folder(Path(folder), write)


@contextlib.contextmanager
def _weights_as(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Let the parameters be of `dtype` for a while. Not `model.to`: that would round buffers for good."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    config_dtype = model.config.dtype
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
        model.config.dtype = config_dtype


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, adapters still inside, under whatever an adapter library wrapped around
    it.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore


def body_of(model: nn.Module) -> Any:
    """The decoder that turns ids_BT into hidden states BTH (`.last_hidden_state`), adapters included."""
    return plain_model(model).get_decoder()


def vocabulary_modules(model: nn.Module) -> tuple[Any, Any]:
    """The input embedding and the output head, whose `weight`s have a row for each id; one matrix where tied."""
    plain = plain_model(model)
    return plain.get_input_embeddings(), plain.get_output_embeddings()


def head_weight(model: nn.Module) -> Tensor:
    """The output head's matrix VH, tied to the input embedding or not: logits are hidden @ head.T."""
    return vocabulary_modules(model)[1].weight


def recompute_activations(model: nn.Module, is_on: bool) -> None:
    """Let backward compute each layer's activations again (`is_on`) instead of holding them: less memory, more time."""
    body: Any = body_of(model)
    # Later releases of transformers warn of the name earlier ones know it by.
    name = "activation" if hasattr(body, "activation_checkpointing_enable") else "gradient"
    if is_on:
        getattr(body, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(body, f"{name}_checkpointing_disable")()


def is_tied(model: nn.Module) -> bool:
    """Whether input embedding and output head are one matrix."""
    return bool(plain_model(model).config.tie_word_embeddings)


def parameter_count(model: nn.Module, *, only_trained: bool = False) -> int:
    """Number of parameters, a tied matrix counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trained)


def check_ids(model: nn.Module | PretrainedConfig, num_ids: int) -> None:
    """Refuse a tokenizer with more ids than the model has rows. Raises UserError."""
    num_rows = model.vocab_size if isinstance(model, PretrainedConfig) else len(head_weight(model))
    if num_ids > num_rows:
        raise UserError(
            f"The tokenizer has {num_ids:,} ids, the model {num_rows:,} rows: {num_ids - num_rows:,} too few.",
            "Grow the model: graftlm expand --model DIR --tokenizer DIR --init subpiece-mean --out DIR.",
        )


def _checked_config(folder: Path) -> PretrainedConfig:
    raw = read_model_config(folder)
    model_type = raw.get("model_type")
    if model_type not in LLAMA_LIKE:
        raise UserError(
            f"{folder / 'config.json'} describes a model of type {model_type!r}, not a Llama-like decoder.",
            f"Choose a base of one of these types: {', '.join(LLAMA_LIKE)}.",
        )
    if raw.get("quantization_config"):
        raise UserError(f"{folder} holds quantised weights.", "Take the model's unquantised weights.")
    if raw.get("auto_map"):
        say(f"{folder}: its config points at code of its own (auto_map); that code is not run.")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if hasattr(config, "auto_map"):
            del config.auto_map
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (
        ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, StrictDataclassError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder / 'config.json'} does not describe a model that can be built: {reason}",
            "Fetch config.json again from where the model came.",
        ) from None
    return config


def _check_tensors(folder: Path, config: PretrainedConfig, tensors: dict[str, StoredTensor]) -> None:
    """Refuse a folder whose tensors are not exactly what the config implies.

    Transformers would invent the rest.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    mend = "Fetch the model again, or correct config.json: weights and config must be of one model."
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise UserError(f"{folder} lacks {_several(missing)}, which its config.json asks for.", mend)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise UserError(f"{folder}: {name} has shape {found}, config.json asks for {list(shape)}.", mend)
    foreign = sorted(n for n in tensors.keys() - shapes.keys() if not n.endswith(_NOT_WEIGHTS))
    if foreign == ["lm_head.weight"] and config.tie_word_embeddings:
        embedding = tensors["model.embed_tokens.weight"]
        if tensor_sha256(tensors["lm_head.weight"]) == tensor_sha256(embedding):
            return
        raise UserError(f"{folder} ties head and embedding (config.json), yet lm_head.weight differs.", mend)
    if foreign:
        raise UserError(f"{folder} holds {_several(foreign)}, which its config.json has no place for.", mend)


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _without_padding_index(model: Any) -> PreTrainedModel:
    """Let every row learn.

    Nn.Embedding drops the gradient of `pad_token_id`'s row, which may be the end token's.
    """
    model.get_input_embeddings().padding_idx = None
    return model
