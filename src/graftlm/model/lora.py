"""LoRA adapters: attach, save, load, merge. The only file importing peft.

Owns the adapter's form on disk: PEFT's own, plus `base.json` with the fingerprint of the base it belongs to.
Does not train. Embedding and head are trained in place, not through PEFT's `modules_to_save`: that would keep
a frozen copy of each beside it, in a dtype of its own. Only the saved form uses it, so that plain PEFT gives
the same logits. PEFT takes more than a second and 55 MB to import: what needs it asks for it when it is called. On the
road it stands inside a LoRA stage and in the adapter export.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from graftlm.errors import NumericalStop, UserError
from graftlm.model.causal import is_tied, model_fingerprint, plain_model, vocabulary_modules
from graftlm.model.weights import read_header, verify_manifest, write_folder
from graftlm.recipe import Projection
from graftlm.run import read_json

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"
PROJECTIONS = get_args(Projection)


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = PROJECTIONS,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Put adapters on the named linear layers and freeze the rest; the same seed draws the same adapters.

    The adapted model computes what the plain one did until something is learned: B starts at zero.
    Source: arXiv 2106.09685; rslora scales by alpha/sqrt(rank), arXiv 2312.03732; dora, arXiv 2402.09353.
    Raises: UserError when a target is not a linear layer of the body.
    """
    assert not hasattr(model, "peft_config"), "merge the earlier adapter first"
    linears = {name.rpartition(".")[2] for name, m in model.get_decoder().named_modules() if isinstance(m, nn.Linear)}
    unknown = sorted(set(targets) - linears)
    if unknown or not targets:
        raise UserError(
            f"LoRA cannot be put on {', '.join(unknown) or 'nothing'}: no linear layer inside the model is called so.",
            f"Choose targets among {', '.join(sorted(linears))}; embedding and head are trained by `rows`.",
        )
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT scales by any number
        lora_dropout=dropout,
        target_modules=sorted(targets),
        use_rslora=rslora,
        use_dora=dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), _without_notices():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return adapted


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """The plain model with the adapters added into its weights.

    Raises NumericalStop when one is not finite.
    """
    if not hasattr(model, "peft_config"):
        return plain_model(model)
    tied = is_tied(model)
    merged = _merged(cast("PeftModel", model))
    # PEFT unties in the config what it finds as two tensors: a split matrix, or the two equal copies it loads.
    merged.config.tie_word_embeddings = tied
    if tied and not parametrize.is_parametrized(merged.get_input_embeddings(), "weight"):
        merged.get_output_embeddings().weight = merged.get_input_embeddings().weight
    # PEFT leaves its settings on the model, where saving it would take it for an adapted one.
    for left_over in ("peft_config", "_hf_peft_config_loaded"):
        if left_over in merged.__dict__:
            delattr(merged, left_over)
    return merged


def _merged(model: PeftModel) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise NumericalStop(
            f"The adapter holds numbers that are not finite: {error}",
            "Take an earlier checkpoint; see what happened with: graftlm autopsy RUN.",
        ) from None


def merged_matrix(
    weight: Tensor, tensors: Mapping[str, Tensor], *, rank: int, alpha: float, rslora: bool, dora: bool
) -> Tensor:
    """One projection's matrix with its adapter added, by the same arithmetic as `merge_lora`: the same bits.

    `tensors` holds the adapter's own by PEFT's names (`lora_A`, `lora_B`, ...). Raises NumericalStop.
    """
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.linear.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["linear"], use_rslora=rslora, use_dora=dora,  # pyright: ignore
    )  # fmt: skip
    with torch.random.fork_rng(), _without_notices():
        adapted: Any = get_peft_model(holder, config)  # pyright: ignore[reportArgumentType]
    named = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name.partition(".linear.")[2]])
    return _merged(adapted).linear.weight.detach()


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    base: str | Path,
    base_fingerprint: str | None = None,
    also: Callable[[Path], None] | None = None,
) -> dict[str, str]:
    """Write the adapter in PEFT's form, whole or not at all, with base.json beside it; sha256 by file.

    Embedding and head go with it when their rows were trained. `base` is the model the adapter belongs to;
    `base_fingerprint` is taken from its files when not given. Raises DiskError.
    """
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    vocabulary = dict(zip(("model.embed_tokens", "lm_head"), vocabulary_modules(model), strict=True))
    trained = {name: m for name, m in vocabulary.items() if any(p.requires_grad for p in m.parameters())}
    tensors |= {f"base_model.model.{name}.weight": module.weight for name, module in trained.items()}
    # PEFT drops the adapter's name from keys, and a split matrix must be saved as one.
    tensors = {name: t for name, t in tensors.items() if ".parametrizations." not in name}
    config: Any = model.peft_config["default"]
    fingerprint = base_fingerprint or model_fingerprint(base)

    def write(scratch: Path) -> None:
        save_file({name: _own_copy(tensor) for name, tensor in tensors.items()}, scratch / ADAPTER_FILE)
        stored = {
            **config.to_dict(),
            "base_model_name_or_path": str(base),
            "modules_to_save": [name.rpartition(".")[2] for name in trained] or None,
            "target_modules": sorted(config.target_modules),
            "inference_mode": True,
        }
        _write_text(scratch / "adapter_config.json", stored)
        _write_text(scratch / BASE_FILE, {"base": str(base), "fingerprint": fingerprint})
        if also is not None:
            also(scratch)

    return write_folder(Path(folder), write)


def load_adapter(model: PreTrainedModel, folder: str | Path, base_fingerprint: str | None = None) -> PeftModel:
    """Put a saved adapter, frozen, on the base it was made for.

    `base_fingerprint` is that of `model`; it is taken from the files the model was loaded from when not
    given. Raises UserError on another base, missing, pickled, truncated or changed files, and tensors that do
    not fit.
    """
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(folder)
    for name in ("adapter_config.json", ADAPTER_FILE, BASE_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is not an adapter of ours: it has no {name}.",
                "Give a folder written by graftlm export --to adapter (adapters are read from safetensors only).",
            )
    verify_manifest(folder)
    stored = read_header(folder / ADAPTER_FILE)
    made_for = read_json(folder / BASE_FILE)
    found = base_fingerprint or model_fingerprint(str(model.name_or_path))
    if made_for["fingerprint"] != found:
        raise UserError(
            f"The adapter {folder} belongs to another base: {made_for['base']} ({made_for['fingerprint'][:12]}), "
            f"not to this model ({found[:12]}).",
            f"Load it on {made_for['base']}, or train an adapter for this model.",
        )
    try:
        with _without_notices():
            adapted = PeftModel.from_pretrained(model, folder, is_trainable=False)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"The adapter {folder} does not fit the model: {reason}", "Export it again.") from None
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    different = sorted(wanted ^ stored.keys())
    if different:
        raise UserError(f"The adapter {folder} and its config disagree on {different[0]}.", "Export it again.")
    return adapted


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Without what PEFT says that is no one's concern: a property's old name, and tied matrices saved as two."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True")
        yield


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_text(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1, default=_plain), encoding="utf-8")


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
