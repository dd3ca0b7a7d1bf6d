"""llama.cpp's own tokenizer, for comparison: a GGUF of the vocabulary and a layer of zeros, asked over its socket."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

from graftlm.text.tokenizer import Tokenizer
from graftlm.text.tokenizer.engines import FastEngine

_WIDTH = 32


def write_gguf(tokenizer: Tokenizer, path: Path, pre: str) -> None:
    """Write the vocabulary; `pre` names llama.cpp's word pattern for a byte-level one (llama-bpe, qwen2).

    llama.cpp's converter finds that name by hashing a probe text that holds Chinese, so a graft changes the hash: it is
    written here, and is the base's.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, tokenizer, pre)
    square, line = np.zeros((_WIDTH, _WIDTH), dtype=np.float32), np.ones(_WIDTH, dtype=np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((tokenizer.num_pieces, _WIDTH), dtype=np.float16))
    writer.add_tensor("output_norm.weight", line)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", line)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    if tokenizer.model is not None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([piece.score for piece in tokenizer.model.pieces])
        writer.add_token_types([piece.type for piece in tokenizer.model.pieces])
        writer.add_add_space_prefix(True)
    else:
        assert isinstance(tokenizer.engine, FastEngine)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        merges = tokenizer.engine.parts["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
        kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
        writer.add_token_types([kinds[i in tokenizer.special_ids] for i in range(tokenizer.num_pieces)])
    writer.add_token_list([tokenizer.piece(i) for i in range(tokenizer.num_pieces)])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_bos_token_id(tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id)
    writer.add_add_bos_token(False)


class LlamaCpp:
    """Calling it encodes a batch of texts, as every other engine of a proof."""

    def __init__(self, tokenizer: Tokenizer, path: Path, pre: str = "default") -> None:
        write_gguf(tokenizer, path, pre)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.warmup, params.fit_params = 256, False, False
        self._server = xllamacpp.Server(params)  # stops when it is no longer held
        host, port = self._server.listening_address.removeprefix("http://").rsplit(":", 1)
        self._connection = http.client.HTTPConnection(host, int(port))

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False})
        self._connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
        return json.loads(self._connection.getresponse().read())["tokens"]
