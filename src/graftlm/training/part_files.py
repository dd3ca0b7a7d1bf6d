"""A checkpoint's tensors in parts: each rank writes its own, and reads what it holds however the parts were cut.

Owns the way to `torch.distributed.checkpoint` and its storage of safetensors: a file's header tells where each part
begins in its whole tensor, and by it a reader finds what it needs. The only file importing it. Each rank calls it for
itself: nothing crosses the wire, and no file holds pickle. Does not know which parts a rank holds (`parts.py`), when
they make a checkpoint (`saving_parts.py`), nor its manifest (`checkpoint.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

FILE_BYTES = 2**28
"""A part is written as files of about so much, or of one larger tensor: the writer makes a file's bytes in memory
first, twice over."""
PREFIX = "shard-"  # begins the names the writer gives its files
GROUP_END = "/"  # between a tensor's group and its name


def write_part(folder: Path, rank: int, groups: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Write what `rank` writes of a checkpoint: by group and name whole tensors, and parts as DTensors on the CPU.

    Returns its files, whose names are no other rank's. They are not yet flushed: the writer flushes before it has
    emptied its own buffer. Raises OSError.
    """
    tensors = {f"{group}{GROUP_END}{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
    writer = HuggingFaceStorageWriter(str(folder), _files_of(tensors), save_distributed=True)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(tensors)
    # The writer numbers files by the place of a plan among all ranks' plans; of the others' it wants no more.
    plan = writer.prepare_global_plan([planner.create_local_plan()] * (rank + 1))[rank]
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    return sorted({folder / result.storage_data.relative_path for result in results})


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number (from 1) of the file each tensor goes to."""
    numbers, number, held = {}, 1, 0
    for name, tensor in tensors.items():
        if held and held + tensor.nbytes > FILE_BYTES:
            number, held = number + 1, 0
        numbers[name] = number
        held += tensor.nbytes
    return numbers


def read_parts(folder: Path, group: str, room_for: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """The tensors of a group by name, in one order on every rank, from all the parts in `folder`.

    `room_for` makes of a name and the whole tensor, on no device, what is to be filled: a whole tensor, or a DTensor on
    the CPU, of which this rank's part is read.
    """
    reader, planner = HuggingFaceStorageReader(str(folder)), DefaultLoadPlanner(flatten_state_dict=False)
    metadata = reader.read_metadata()
    found = {}
    for key in sorted(key for key in metadata.state_dict_metadata if key.partition(GROUP_END)[0] == group):
        told: Any = metadata.state_dict_metadata[key]
        whole = torch.empty(told.size, dtype=told.properties.dtype, device="meta")
        found[key] = room_for(key.partition(GROUP_END)[2], whole)
    if not found:  # as moments before the first step
        return {}
    planner.set_up_planner(found, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    return {key.partition(GROUP_END)[2]: tensor for key, tensor in found.items()}
