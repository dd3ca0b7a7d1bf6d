"""Verbs that hand a finished model on: export, card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.options import AsJson
from graftlm.cli.show import plain, show


def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run's folder; for gguf a model folder too.")
    ],
    to: Annotated[str, typer.Option(help="hf, adapter or gguf.")] = "hf",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; RUN/export-hf, -adapter or -gguf-f16 if not given.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of gguf: f16 (half precision, the default) or q8_0 (8 bits).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model for transformers, PEFT or llama.cpp. It is read again and its logits compared.

    Example: graftlm export runs/demo --to gguf --quantization q8_0 --out demo-gguf
    """
    from graftlm.pipeline import export_run

    written = export_run(run_folder, to, out, quantization)
    show(written, as_json)
    if not as_json and written.dtype == "q8_0":
        print(
            "\nlossy   8 bits a weight, each checked to be as near as they allow. Of the "
            f"{written.num_compared_tokens} places compared {written.num_likeliest_changed} have another likeliest "
            "piece: answers may differ from the trained model's. f16 keeps them closer."
        )
    if not as_json:
        print(f"\nload    {plain(how_to_load(to, written.folder, list(written.files)))}")


def how_to_load(to: str, folder: str, files: list[str]) -> str:
    """A line to type for what was exported."""
    if to == "gguf":
        return f"llama-cli -m {folder}/{next(name for name in files if name.endswith('.gguf'))} --jinja -cnv --temp 0"
    if to == "adapter":
        base = f'AutoModelForCausalLM.from_pretrained("{folder}/base")'
        return f'PeftModel.from_pretrained({base}, "{folder}/adapter")'
    return f'AutoModelForCausalLM.from_pretrained("{folder}")'


def card(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Print a run's model card, in English and Chinese, from what the run recorded.

    Example: graftlm card runs/demo
    """
    from graftlm.release.card import card_text

    print(card_text(run_folder), end="")
