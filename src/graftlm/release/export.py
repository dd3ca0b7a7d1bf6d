"""The finished model as others load it: a plain Hugging Face folder, or an adapter for plain PEFT.

Owns what stands beside the weights (tokenizer with its chat template, generation settings), and the
comparison of what was written with what was trained. Does not train, evaluate or describe. On the road:
`N-model`.

Shapes: T tokens, V rows of the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import GenerationConfig, PreTrainedModel

from graftlm.model.causal import body_of, check_ids, head_weight, load_causal, plain_model, save_causal
from graftlm.model.lora import load_adapter, merge_lora, save_adapter
from graftlm.text.dialogue import BUILT_IN, Conversation, Message, Template, render
from graftlm.text.tokenizer import Tokenizer, load_tokenizer

# Merged = adapter within 1e-4 (N4) holds for weights stored as they were trained.
EXACT_TOLERANCE = 1e-4
_MAX_COMPARED_TOKENS = 512
SAMPLES = (
    Conversation((Message("user", "What is the capital of France?"), Message("assistant", "It is Paris."))),
    Conversation((Message("user", "12 + 30 = ?"), Message("assistant", "42"))),
    Conversation((Message("user", "中国的首都是哪里？"), Message("assistant", "北京是中国的首都。"))),
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export wrote: sha256 by file, and how far its re-loaded logits lie from the trained model's.

    With 16-bit weights the distance is that of rounding; that nothing else changed is checked tensor by
    tensor.
    """

    files: dict[str, str]
    max_logit_difference: float
    dtype: str
    num_compared_tokens: int


def export_model(
    model: Any,
    tokenizer: Tokenizer,
    template_jinja: str,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard: str = "5GB",
    samples: Sequence[Conversation] = SAMPLES,
) -> Manifest:
    """Write a trained model (a folder, a plain model, or one with adapters, which are merged) for everyone to
    load.

    The folder is loaded again: every tensor must be the trained one rounded to `dtype`, embedding and head
    included, and the logits on rendered `samples` are compared. Raises UserError, DiskError.
    """
    if isinstance(model, str | Path):
        model = load_causal(model)
    check_ids(plain_model(model), tokenizer.num_pieces)
    template = _template_of(template_jinja)
    rows = [_sample_ids(sample, tokenizer, template) for sample in samples]
    trained_logits = [_logits_TV(model, ids) for ids in rows]
    merged = merge_lora(model)
    merged.generation_config = generation_settings(merged, tokenizer, template)
    merged.config.eos_token_id = merged.generation_config.eos_token_id
    merged.config.bos_token_id, merged.config.pad_token_id = tokenizer.bos_id, tokenizer.pad_id

    def carry(scratch: Path) -> None:
        tokenizer.save(scratch, chat_template=template_jinja)

    files = save_causal(merged, out, max_shard, also=carry, dtype=dtype)
    _check_tokenizer(Path(out), tokenizer, template_jinja)
    loaded: Any = load_causal(out)
    loaded.to(merged.device)
    _check_tensors(merged, loaded, dtype)
    difference = _largest_difference(trained_logits, [_logits_TV(loaded, ids) for ids in rows])
    if dtype == torch.float32:
        assert difference <= EXACT_TOLERANCE, f"the merged model's logits lie {difference} from the trained ones"
    return Manifest(files, difference, str(dtype).removeprefix("torch."), sum(map(len, rows)))


def export_adapter(
    model: Any,
    tokenizer: Tokenizer,
    template_jinja: str,
    out: str | Path,
    base: str | Path,
    *,
    samples: Sequence[Conversation] = SAMPLES,
) -> Manifest:
    """Write the adapters of a trained model, and its embedding and head if they learned, for plain PEFT on
    `base`.

    Loaded again on `base`, the logits must be the trained model's within 1e-4. Raises UserError, DiskError.
    """
    check_ids(plain_model(model), tokenizer.num_pieces)
    template = _template_of(template_jinja)
    rows = [_sample_ids(sample, tokenizer, template) for sample in samples]
    trained_logits = [_logits_TV(model, ids) for ids in rows]

    def carry(scratch: Path) -> None:
        tokenizer.save(scratch, chat_template=template_jinja)

    files = save_adapter(model, out, base, also=carry)
    _check_tokenizer(Path(out), tokenizer, template_jinja)
    loaded_base: Any = load_causal(base)
    loaded = load_adapter(loaded_base.to(plain_model(model).device), out)
    difference = _largest_difference(trained_logits, [_logits_TV(loaded, ids) for ids in rows])
    assert difference <= EXACT_TOLERANCE, f"the re-loaded adapter's logits lie {difference} from the trained ones"
    return Manifest(files, difference, "float32", sum(map(len, rows)))


def generation_settings(model: PreTrainedModel, tokenizer: Tokenizer, template: Template) -> GenerationConfig:
    """How others generate by default: it stops where an answer of the template ends, and never samples
    nothing.

    Suppressed are rows beyond the tokenizer (padding no training moved, which may win all the same) and the
    control pieces that begin, pad or stand for the unknown.
    """
    end = render(SAMPLES[0], tokenizer, template)
    ends = sorted({tokenizer.eos_id, *_last_target(end.ids, end.is_target, tokenizer)})
    silent = {i for i in (tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id) if i is not None} - set(ends)
    never = sorted(silent | set(range(tokenizer.num_pieces, len(head_weight(model)))))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_id,
        suppress_tokens=never or None,
        do_sample=False,
    )


def _last_target(ids: list[int], is_target: list[bool], tokenizer: Tokenizer) -> list[int]:
    targets = [i for i, learned in zip(ids, is_target, strict=True) if learned]
    return [i for i in targets[-1:] if i in tokenizer.special_ids]


def _template_of(jinja: str) -> Template:
    return next((t for t in BUILT_IN.values() if t.jinja == jinja), Template("exported", jinja, "all"))


def _sample_ids(sample: Conversation, tokenizer: Tokenizer, template: Template) -> list[int]:
    return render(sample, tokenizer, template).ids[:_MAX_COMPARED_TOKENS]


@torch.no_grad()
def _logits_TV(model: Any, ids: list[int]) -> Tensor:
    """Logits in fp32, dropout off."""
    was_training = model.training
    model.eval()
    weight = head_weight(model)
    hidden_TH = body_of(model)(torch.tensor([ids], device=weight.device), use_cache=False).last_hidden_state[0]
    model.train(was_training)
    return linear(hidden_TH, weight).float()


def _largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    difference = max(((a - b).abs().max().item() for a, b in zip(expected, found, strict=True)), default=0.0)
    assert math.isfinite(difference), "the exported model gives logits that are not finite"
    return difference


def _check_tensors(trained: PreTrainedModel, loaded: PreTrainedModel, dtype: torch.dtype) -> None:
    expected, found = dict(trained.named_parameters()), dict(loaded.named_parameters())
    assert expected.keys() == found.keys(), f"tensors differ: {sorted(expected.keys() ^ found.keys())[:3]}"
    for name, parameter in expected.items():
        assert torch.equal(parameter.to(dtype).float(), found[name].float()), f"{name} changed in the export"


def _check_tokenizer(out: Path, tokenizer: Tokenizer, template_jinja: str) -> None:
    loaded = load_tokenizer(out)
    assert loaded.fingerprint == tokenizer.fingerprint, "the exported tokenizer encodes differently"
    assert loaded.chat_template == template_jinja, "the exported chat template differs"
