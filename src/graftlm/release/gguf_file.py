"""A model's tensors and geometry in a GGUF file, and such a file read back.

Owns llama.cpp's names, its order of rotary dimensions, its types, and how a damaged file is told. One tensor is in
memory at a time. Does not know tokenizers (`gguf_vocabulary.py`) or what a run is.

Rows beyond the tokenizer (padding that no training moved) are left out: nothing can ever sample them.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from torch import Tensor
from transformers import PretrainedConfig

from graftlm.errors import UserError
from graftlm.model.causal import empty_causal
from graftlm.model.tensors import EMBEDDING, HEAD, TensorSource, require_finite, shapes_of
from graftlm.run import progress

Quantization = Literal["f16", "q8_0"]
_KINDS = {"f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16), "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0)}
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_Q8_BLOCK = 32
_ROWS_AT_A_TIME = 4096
_HF = "Export with --to hf."


@dataclass(frozen=True, slots=True)
class _Plan:
    """One tensor as it will lie in the file: our name, llama.cpp's, its shape and type, and heads to reorder (or 0)."""

    name: str
    stored_name: str
    shape: tuple[int, ...]
    kind: Kind
    num_heads: int


def write_gguf(
    source: TensorSource,
    path: Path,
    quantization: Quantization,
    num_pieces: int,
    add_more: Callable[[GGUFWriter], None],
) -> dict[str, str]:
    """Write the model with its first `num_pieces` rows; `add_more` completes the header. sha256 by tensor.

    Raises UserError for geometry that llama.cpp cannot express, NumericalStop for numbers beyond fp16.
    """
    config: Any = source.config
    writer = GGUFWriter(path, _ARCHITECTURES[config.model_type])
    factors = _add_geometry(writer, config, num_pieces)
    writer.add_file_type(_KINDS[quantization][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_more(writer)
    plans = _plans(config, source.shapes, _KINDS[quantization][0], num_pieces)
    for plan in plans:
        num_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(plan.shape, plan.kind)) if plan.kind == Kind.Q8_0
                        else np.prod(plan.shape) * (2 if plan.kind == Kind.F16 else 4))  # fmt: skip
        writer.add_tensor_info(plan.stored_name, plan.shape, np.dtype(np.float32), num_bytes, raw_dtype=plan.kind)
    if factors is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes, raw_dtype=Kind.F32
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    digests = {}
    for plan in progress(plans, len(plans), f"writing {path.name}"):
        content = _stored(plan, source.read(plan.name))
        writer.write_tensor_data(content)
        digests[plan.stored_name] = hashlib.sha256(content.tobytes()).hexdigest()
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()
    return digests


def _add_geometry(writer: GGUFWriter, config: Any, num_pieces: int) -> np.ndarray | None:
    """Write sizes and rotary settings; returns the factors of rotary frequencies where they need a tensor."""
    head_size = _head_size(config)
    # Within its window a sliding one is plain attention, which is what llama.cpp computes.
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(num_pieces)
    writer.add_rope_dimension_count(head_size)
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or _ARCHITECTURES[config.model_type] != "llama":
        raise UserError(f"Rotary scaling {kind!r} of a {config.model_type} model is not written to GGUF.", _HF)
    return _rotary_factors(config)


def _rotary_factors(config: Any) -> np.ndarray:
    """By how much each rotary frequency is divided: what transformers computes from the config, against no scaling."""
    body: Any = empty_causal(config).get_decoder()
    scaled = type(body.rotary_emb)(config).inv_freq.double()
    exponents = torch.arange(0, _head_size(config), 2, dtype=torch.float64) / _head_size(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    return (plain / scaled).float().numpy()


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _plans(config: Any, shapes: Mapping[str, tuple[int, ...]], kind: Kind, num_pieces: int) -> list[_Plan]:
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    plans = []
    for name, shape in shapes.items():
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, f"llama.cpp has no name for {name}"
        if name in (EMBEDDING, HEAD):
            shape = (num_pieces, *shape[1:])
        stored_kind = Kind.F32 if len(shape) == 1 else kind
        if stored_kind == Kind.Q8_0 and shape[-1] % _Q8_BLOCK:
            stored_kind = Kind.F16  # rows of another length do not divide into its blocks
        plans.append(_Plan(name, stored_name, shape, stored_kind, _heads_to_reorder(name, config)))
    return plans


def _heads_to_reorder(name: str, config: Any) -> int:
    if _ARCHITECTURES[config.model_type] != "llama":
        return 0
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else 0


def interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """A head's rotary halves (transformers) as neighbouring pairs (llama.cpp). Rows are those of q_proj or k_proj.

    Source: ggml-org/llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute.
    """
    return tensor.view(num_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def halved(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo `interleaved`."""
    return tensor.view(num_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _stored(plan: _Plan, tensor: Tensor) -> np.ndarray:
    tensor = tensor[: plan.shape[0]]
    if plan.num_heads:
        tensor = interleaved(tensor, plan.num_heads)
    if plan.kind != Kind.F32:  # blocks of q8_0 have a scale in fp16
        require_finite(plan.name, tensor, torch.float16)
    if plan.kind == Kind.F16:
        return tensor.half().contiguous().numpy()
    rows = tensor.contiguous().numpy()
    if plan.kind == Kind.F32:
        return rows
    blocks = [_eight_bits(plan.name, rows[k : k + _ROWS_AT_A_TIME]) for k in range(0, len(rows), _ROWS_AT_A_TIME)]
    return np.concatenate(blocks)


def _eight_bits(name: str, rows: np.ndarray) -> np.ndarray:
    """The rows in blocks of 32 numbers of 8 bits with one scale in fp16, each number as near as that form allows.

    A block's step is its largest number / 127. Rounding to it costs half a step, rounding the step to fp16 at most
    127 times its share 2^-11 (or, below fp16's normal numbers, 2^-25 each time).
    Source of the form: ggml-org/ggml, block_q8_0 and quantize_row_q8_0.
    """
    stored = gguf.quantize(rows, Kind.Q8_0)
    numbers, found = (x.reshape(-1, _Q8_BLOCK) for x in (rows, gguf.dequantize(stored, Kind.Q8_0)))
    steps = np.abs(numbers).max(-1, keepdims=True) / 127
    bounds = steps * (0.5 + 127 * 2**-11) * (1 + 1e-5) + 127 * 2**-25  # 1e-5: of the float32 arithmetic itself
    assert (np.abs(numbers - found) <= bounds).all(), f"{name} in 8 bits lies further from the trained than rounding"
    return stored


@dataclass(frozen=True, slots=True)
class _Stored:
    kind: Kind
    offset: int
    num_bytes: int


def open_gguf(path: Path) -> Mapping[str, _Stored]:
    """Where each tensor of a GGUF file lies. Raises UserError when it is cut short, damaged or another kind of file."""
    again = "Copy or export it again; nothing of it was used."
    try:
        reader = GGUFReader(path)
        tensors = {t.name: _Stored(t.tensor_type, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as error:
        size_bytes = path.stat().st_size if path.is_file() else 0
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} ({size_bytes:,} bytes) is not a whole GGUF file: it is cut short or damaged ({reason}).", again
        ) from None
    expected, found = max((t.offset + t.num_bytes for t in tensors.values()), default=0), path.stat().st_size
    if expected > found or not tensors:
        raise UserError(f"{path} has {found:,} bytes; its header tells of at least {expected:,}.", again)
    return tensors


def source_of_gguf(path: Path, like: PretrainedConfig, num_pieces: int) -> tuple[TensorSource, dict[str, str]]:
    """The model in a GGUF file written by `write_gguf` from one of config `like`; and sha256 by tensor.

    Raises UserError as `open_gguf`.
    """
    stored = open_gguf(path)
    config: Any = copy.deepcopy(like)
    config.vocab_size = num_pieces
    shapes = shapes_of(config)
    plans = {p.name: p for p in _plans(config, shapes, Kind.F16, num_pieces)}

    def read(name: str) -> Tensor:
        plan = plans[name]
        raw = _raw(path, stored[plan.stored_name])
        tensor = torch.from_numpy(gguf.dequantize(raw, stored[plan.stored_name].kind).copy()).view(plan.shape)
        return halved(tensor, plan.num_heads) if plan.num_heads else tensor

    digests = {
        plan.stored_name: hashlib.sha256(_raw(path, stored[plan.stored_name]).tobytes()).hexdigest()
        for plan in plans.values()
    }
    return TensorSource(config, shapes, read), digests


def _raw(path: Path, stored: _Stored) -> np.ndarray:
    return np.fromfile(path, dtype=np.uint8, count=stored.num_bytes, offset=stored.offset)
