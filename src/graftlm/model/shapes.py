"""The geometry of a decoder: the few sizes that decide its parameters, memory and arithmetic.

Owns reading them from a config, and a table of published ones, so that a plan needs neither weights nor the hub. Does
not know training. A plan begins here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftlm.errors import UserError
from graftlm.model.weights import read_model_config


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-like decoder. `has_qkv_bias` as Qwen2, `has_head_norms` (of queries and keys) as Qwen3."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_rows: int
    is_tied: bool = False
    has_qkv_bias: bool = False
    has_head_norms: bool = False

    @property
    def query_width(self) -> int:
        """Numbers of all queries of one position."""
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Numbers of all keys, or all values, of one position."""
        return self.num_kv_heads * self.head_size

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear maps by name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, self.query_width), "k_proj": (hidden, self.kv_width), "v_proj": (hidden, self.kv_width),
            "o_proj": (self.query_width, hidden),
            "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
        }  # fmt: skip

    @property
    def layer_matrices(self) -> int:
        """Parameters in a layer's linear maps."""
        return sum(inner * outer for inner, outer in self.projections.values())

    @property
    def layer_vectors(self) -> int:
        """A layer's other parameters: norms and biases."""
        biases = self.query_width + 2 * self.kv_width if self.has_qkv_bias else 0
        return 2 * self.hidden_size + biases + (2 * self.head_size if self.has_head_norms else 0)

    @property
    def body_parameters(self) -> int:
        """Parameters between embedding and head, the last norm among them."""
        return self.num_layers * (self.layer_matrices + self.layer_vectors) + self.hidden_size

    @property
    def row_matrices(self) -> int:
        """How many matrices have a row for every id: embedding and head, or one where they are tied."""
        return 1 if self.is_tied else 2

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return self.body_parameters + self.row_matrices * self.num_rows * self.hidden_size

    def with_rows(self, num_rows: int) -> Shape:
        """The same decoder with another vocabulary."""
        return replace(self, num_rows=num_rows)

    def adapter_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of LoRA on `targets` of every layer."""
        known = self.projections
        return self.num_layers * sum(rank * sum(known[name]) for name in targets if name in known)


# Source: config.json of each model on the hub, as published by its makers.
PUBLISHED: Mapping[str, Shape] = {
    "Llama-2-7b": Shape(32, 4096, 11_008, 32, 32, 128, 32_000),
    "Llama-2-13b": Shape(40, 5120, 13_824, 40, 40, 128, 32_000),
    "Llama-2-70b": Shape(80, 8192, 28_672, 64, 8, 128, 32_000),
    "Meta-Llama-3-8B": Shape(32, 4096, 14_336, 32, 8, 128, 128_256),
    "Llama-3.1-8B": Shape(32, 4096, 14_336, 32, 8, 128, 128_256),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 64, 128_256, is_tied=True),
    "Llama-3.2-3B": Shape(28, 3072, 8192, 24, 8, 128, 128_256, is_tied=True),
    "TinyLlama-1.1B": Shape(22, 2048, 5632, 32, 4, 64, 32_000),
    "Mistral-7B": Shape(32, 4096, 14_336, 32, 8, 128, 32_000),
    "Qwen2.5-7B": Shape(28, 3584, 18_944, 28, 4, 128, 152_064, has_qkv_bias=True),
    "Qwen3-8B": Shape(36, 4096, 12_288, 32, 8, 128, 151_936, has_head_norms=True),
}
# Endings that change what a model says, not its shape.
_SAME_SHAPE = ("-hf", "-chat-hf", "-chat", "-Instruct", "-Base", "-v0.1", "-Chat-v1.0", "-intermediate-step-1431k-3T")


def find_shape(path_or_hub_id: str) -> tuple[Shape, str]:
    """The shape of a model and where it was read: its folder, the published table, or its config on the hub.

    Raises UserError where none of them knows it.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return shape_of(read_model_config(folder), str(folder / "config.json")), str(folder / "config.json")
    published = _published(path_or_hub_id)
    if published is not None:
        return published, "published config"
    return _from_hub(path_or_hub_id)


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """Read a config of transformers. Raises UserError naming what it lacks."""
    try:
        hidden, num_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        kind = config.get("model_type")
        return Shape(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_size=int(config.get("head_dim") or hidden // num_heads),
            num_rows=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=kind == "qwen2" or bool(config.get("attention_bias")),
            has_head_norms=kind == "qwen3",
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{where} does not describe a Llama-like decoder: {error!r}.", "Choose a base of the Llama family."
        ) from None


def _published(name: str) -> Shape | None:
    """The published shape a hub id names; longer names first, so that 13b is not taken for another's beginning."""
    model = name.rpartition("/")[2]
    for known, shape in PUBLISHED.items():
        if model == known or (model.startswith(known) and model[len(known) :] in _SAME_SHAPE):
            return shape
    return None


def _from_hub(name: str) -> tuple[Shape, str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if Path(name).is_absolute():
        raise UserError(
            f"{name} is not there: no such folder.", "Give base.model a folder with a config.json, or a hub id."
        )
    try:
        path = Path(hf_hub_download(name, "config.json"))
        return shape_of(json.loads(path.read_text(encoding="utf-8")), f"{name}/config.json"), f"{name} on the hub"
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"The shape of {name} is not known: no such folder, not in the table of published shapes, and its config "
            f"is not to be had from the hub ({type(error).__name__}).",
            f"Check the name and the connection, or give base.model a folder with its config.json. "
            f"Known without either: {', '.join(PUBLISHED)}.",
        ) from None
