"""A model whose tensors are read one at a time: for work on models larger than memory.

Owns where one tensor comes from (a folder, a model in memory), writing them in shards, and a forward pass, all of
which hold one matrix at a time.
Does not know adapters, stages or file formats of other programs. On the road the export reads, merges, writes and
compares through it.

Shapes: B rows of a batch, T tokens, V rows of the head.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from graftlm.errors import NumericalStop
from graftlm.model.causal import check_folder, empty_causal
from graftlm.model.weights import INDEX, StoredTensor
from graftlm.run import progress

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A plain causal LM: its config, the shapes of its tensors in order, and a way to read one (fp32, on the CPU).

    A tied head has no tensor of its own.
    """

    config: PretrainedConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def source_of_folder(path_or_hub_id: str | Path) -> TensorSource:
    """The model in a folder, checked whole as `load_causal` does. Raises UserError."""
    _, config, stored = check_folder(path_or_hub_id)
    return TensorSource(config, shapes_of(config), lambda name: read_stored(stored[name]))


def source_of_model(model: PreTrainedModel) -> TensorSource:
    """A plain model in memory; its tensors are copied when they are read."""
    named = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    return TensorSource(model.config, shapes, lambda name: named[name].detach().to("cpu", torch.float32, copy=True))


def shapes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model a config describes."""
    return {name: tuple(parameter.shape) for name, parameter in empty_causal(config).named_parameters()}


def read_stored(stored: StoredTensor) -> Tensor:
    """One tensor out of a safetensors file, in fp32.

    Read and not mapped: pages of a mapped file count as memory of the process.
    """
    with stored.file.open("rb") as stream:
        stream.seek(stored.begin)
        content = bytearray(stored.end - stored.begin)
        if stream.readinto(content) != len(content):
            raise OSError(f"{stored.file} ended while it was read")
    return torch.frombuffer(content, dtype=_DTYPES[stored.dtype]).view(stored.shape).float()


@torch.no_grad()
def streamed_logits(source: TensorSource, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits TV of each row of ids, in fp32, with one matrix of the model in memory at a time.

    All rows go through in one batch, padded at their ends: what follows a token cannot change what it sees.
    """
    if not rows:
        return []
    model: Any = empty_causal(source.config).eval()
    body = model.get_decoder()
    body.rotary_emb = type(body.rotary_emb)(source.config)  # a buffer computed from the config, real from the start
    for path, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            _read_when_called(module, path, source)
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows])
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return [logits_TV[: len(ids)].float() for logits_TV, ids in zip(logits_BTV, rows, strict=True)]


def _read_when_called(module: nn.Module, path: str, source: TensorSource) -> None:
    empty = dict(module.named_parameters(recurse=False))

    def fill(*_: object) -> None:
        for name in empty:
            full = f"{path}.{name}"
            tensor = source.read(full if full in source.shapes else EMBEDDING)  # a tied head
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def clear(*_: object) -> None:
        for name, parameter in empty.items():
            module.register_parameter(name, parameter)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(clear)


def write_source(source: TensorSource, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, str]:
    """Write the model's tensors rounded to `dtype`, in shards, one tensor in memory at a time; sha256 by tensor.

    Raises NumericalStop for a number that is not finite, or is not in `dtype`.
    """
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    sizes = {name: math.prod(shape) * item_bytes for name, shape in source.shapes.items()}
    shards = _shards(sizes, max_shard_bytes)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with (folder / file).open("wb") as stream:
            stream.write(_header(names, source.shapes, sizes, dtype))
            for name in progress(names, len(names), f"writing {file}"):
                content = _content(name, source.read(name), dtype)
                stream.write(content)
                digests[name] = hashlib.sha256(content).hexdigest()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def _shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _header(names: list[str], shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], dtype: torch.dtype) -> bytes:
    """Source: the safetensors format: length, then JSON padded with spaces so that the tensors begin aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kind = next(name for name, known in _DTYPES.items() if known == dtype)
    begin = 0
    for name in names:
        entries[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [begin, begin + sizes[name]]}
        begin += sizes[name]
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _content(name: str, tensor: Tensor, dtype: torch.dtype) -> Any:
    require_finite(name, tensor, dtype)
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()


def require_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise NumericalStop where a tensor holds a number that is not finite, or not in `dtype`."""
    greatest = tensor.abs().max()  # nan where one of them is
    if greatest.isfinite() and greatest <= torch.finfo(dtype).max:
        return
    if tensor.isfinite().all():
        raise NumericalStop(
            f"{name} holds {greatest:g}, which is beyond {str(dtype).removeprefix('torch.')}.",
            "Set export.dtype to bf16 or fp32 and export with --to hf.",
        )
    raise NumericalStop(f"{name} holds numbers that are not finite.", "See what happened with: graftlm autopsy RUN.")
