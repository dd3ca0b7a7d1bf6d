"""Keys and values of many rows of different lengths, in one buffer a layer that rows join and leave.

Owns the buffers, their growth within a budget, the mask each forward needs, and the forward itself up to the logits
of each row's last token. Does not know requests, sampling or text. Rows lie left-aligned: position p of a row is place
p of its slot, whatever the others hold, so joining and leaving move nothing but the row concerned.

Shapes: S slots, K key-value heads, C places a slot holds, D head size, B rows of a forward, L tokens of it a row,
T places looked at, H hidden size, V rows of the output head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graftlm.model.causal import body_of, vocabulary_modules

# Buffers grow by this many places at once, so that growing, a copy, is rare.
PLACES_AT_ONCE = 128


def rounded_places(tokens: int) -> int:
    """The places a slot needs for this many tokens, in whole steps of growth."""
    return -(-tokens // PLACES_AT_ONCE) * PLACES_AT_ONCE


class Slots:
    """The rows' keys and values, and the model that reads and writes them.

    transformers calls `update` in every attention layer, as it does with its own caches.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        self._config = config
        self._body, self._head = body_of(model), vocabulary_modules(model)[1]
        self.num_layers: int = config.num_hidden_layers
        self._num_heads: int = config.num_key_value_heads
        self._head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.device, self._dtype = self._head.weight.device, self._head.weight.dtype
        self._keys_SKCD = [self._buffer(0, 0) for _ in range(self.num_layers)]
        self._values_SKCD = [self._buffer(0, 0) for _ in range(self.num_layers)]
        self._lengths: list[int] = []
        self._first, self._num_places = 0, 0  # of the forward under way: its first slot, the places it looks at
        self._starts: Sequence[int] = ()
        self._rows_B = self._starts_B = torch.empty(0, dtype=torch.long)

    def _buffer(self, num_slots: int, num_places: int) -> torch.Tensor:
        # Zeros: a place nobody sees has weight 0, and 0 times whatever memory held before may be NaN.
        return torch.zeros(
            num_slots, self._num_heads, num_places, self._head_size, dtype=self._dtype, device=self.device
        )

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def token_bytes(self) -> int:
        """Memory of one token's keys and values."""
        return 2 * self.num_layers * self._num_heads * self._head_size * self._dtype.itemsize

    @property
    def capacity_tokens(self) -> int:
        """Tokens the buffers now have room for, used or not."""
        return self._keys_SKCD[0].shape[0] * self._keys_SKCD[0].shape[2]

    def join(self) -> int:
        """A new empty row behind the others; returns its slot."""
        self._lengths.append(0)
        return len(self._lengths) - 1

    def length(self, slot: int) -> int:
        """Tokens of a row whose keys and values are here."""
        return self._lengths[slot]

    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another, which is lost. The source's slot is then to be left or moved into."""
        length = self._lengths[source]
        for buffer_SKCD in (*self._keys_SKCD, *self._values_SKCD):
            buffer_SKCD[target, :, :length] = buffer_SKCD[source, :, :length]
        self._lengths[target] = length

    def begin_like(self, slot: int, source: int, num_tokens: int) -> None:
        """Let an empty row begin with another's first tokens: their keys and values are copied, not computed."""
        for buffer_SKCD in (*self._keys_SKCD, *self._values_SKCD):
            buffer_SKCD[slot, :, :num_tokens] = buffer_SKCD[source, :, :num_tokens]
        self._lengths[slot] = num_tokens

    def drop_last(self) -> None:
        """The last row leaves."""
        self._lengths.pop()

    def wipe(self, slot: int) -> None:
        """Forget what a slot holds, numbers that are none included."""
        for buffer_SKCD in (*self._keys_SKCD, *self._values_SKCD):
            buffer_SKCD[slot] = 0

    def clear(self) -> None:
        """All rows leave; the memory is given back."""
        self._lengths = []
        self._keys_SKCD = [self._buffer(0, 0) for _ in range(self.num_layers)]
        self._values_SKCD = [self._buffer(0, 0) for _ in range(self.num_layers)]

    def reserve(self, num_slots: int, num_places: int, budget_tokens: int) -> None:
        """Make room for so many slots of so many places. More than asked is kept only where the budget allows."""
        slots, places = self._keys_SKCD[0].shape[0], self._keys_SKCD[0].shape[2]
        if num_slots <= slots and num_places <= places:
            return
        num_places = rounded_places(num_places)
        if max(slots, num_slots) * max(places, num_places) <= budget_tokens:
            num_slots, num_places = max(slots, num_slots), max(places, num_places)
        held, longest = len(self._lengths), max(self._lengths, default=0)
        for buffers in (self._keys_SKCD, self._values_SKCD):
            for layer, old_SKCD in enumerate(buffers):
                new_SKCD = self._buffer(num_slots, num_places)
                used = min(held, old_SKCD.shape[0])
                new_SKCD[:used, :, :longest] = old_SKCD[:used, :, :longest]
                buffers[layer] = new_SKCD

    @torch.inference_mode()
    def forward(self, first: int, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Let the rows of slots `first`… read their next tokens; returns logits (B, V) after the last of each."""
        lengths = [len(ids) for ids in tokens]
        longest = max(lengths)
        slots = range(first, first + len(tokens))
        starts = [self._lengths[slot] for slot in slots]
        ids_BL = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in tokens], device=self.device)
        starts_B = torch.tensor(starts, device=self.device)
        positions_BL = starts_B[:, None] + torch.arange(longest, device=self.device)
        self._first, self._starts, self._starts_B = first, starts, starts_B
        self._rows_B = torch.arange(first, first + len(tokens), device=self.device)
        self._num_places = max(starts) + longest
        output = self._body(
            input_ids=ids_BL, attention_mask=self._mask(positions_BL), position_ids=positions_BL, past_key_values=self,
            use_cache=True,
        )  # fmt: skip
        for slot, length in zip(slots, lengths, strict=True):
            self._lengths[slot] += length
        hidden_BLH = output.last_hidden_state
        if longest == 1:
            return self._head(hidden_BLH[:, 0])
        last_B = torch.tensor(lengths, device=self.device) - 1
        return self._head(hidden_BLH[torch.arange(len(tokens), device=self.device), last_B])

    def update(
        self, keys_BKLD: torch.Tensor, values_BKLD: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values into the rows' slots; returns all their places up to the longest row's last."""
        pair = (self._keys_SKCD[layer], keys_BKLD), (self._values_SKCD[layer], values_BKLD)
        last = self._first + len(self._starts)
        for buffer_SKCD, new_BKLD in pair:
            if new_BKLD.shape[2] == 1:
                buffer_SKCD[self._rows_B, :, self._starts_B] = new_BKLD[:, :, 0]
                continue
            for row, start in enumerate(self._starts):
                buffer_SKCD[self._first + row, :, start : start + new_BKLD.shape[2]] = new_BKLD[row]
        return tuple(buffer[self._first : last, :, : self._num_places] for buffer, _ in pair)  # type: ignore

    def get_seq_length(self, layer: int = 0) -> int:
        """What transformers asks of a cache; positions and masks are given, so nothing hangs on it."""
        return self._num_places

    def _mask(self, positions_BL: torch.Tensor) -> Any:
        """Which places each position sees (B, 1, L, T): its own row up to itself, in sliding layers only so far back.

        A mask for each kind of layer where the model has several, as transformers takes it.
        """
        places_T = torch.arange(self._num_places, device=self.device)
        seen_B1LT = (places_T <= positions_BL[:, :, None])[:, None]
        window = getattr(self._config, "sliding_window", None)
        near_B1LT = seen_B1LT
        if window:
            near_B1LT = seen_B1LT & (places_T > positions_BL[:, :, None] - window)[:, None]
        if hasattr(self._config, "layer_types"):
            return {"full_attention": seen_B1LT, "sliding_attention": near_B1LT}
        return near_B1LT
