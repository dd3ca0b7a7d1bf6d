"""LLaMA-Factory's arm of `bench/cpu.py`: its `run_exp` on the rows and weights of the job. Runs in its environment.

Rows come as ids and labels by `tokenized_path`. Where its neat packing is asked for, its own packer packs the rows of
each step, so that a step holds the rows it holds in every arm; only the encoding of text is left out. Settings are its
arguments; what is not named keeps its default.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, DatasetDict
from llamafactory.data.processor import PackedSupervisedDatasetProcessor  # pyright: ignore[reportMissingImports]
from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]
from measure import Result, read_rows, run, watcher


class EncodedRows(PackedSupervisedDatasetProcessor):
    """Its packer, given rows that are encoded already."""

    def _encode_data_example(self, prompt: Any, response: Any, *_: Any, **__: Any) -> tuple[list[int], list[int]]:
        return response[0]["input_ids"], response[0]["labels"]


def packed(rows: list[dict[str, list[int]]], cutoff_len: int, pad_id: int) -> list[dict[str, Any]]:
    """One step's rows as LLaMA-Factory packs them."""
    packer = EncodedRows(
        template=None, processor=None, tokenizer=SimpleNamespace(pad_token_id=pad_id),
        data_args=SimpleNamespace(cutoff_len=cutoff_len, neat_packing=True),
    )  # fmt: skip
    nothing = [None] * len(rows)
    made = packer.preprocess_dataset(
        {"_prompt": [[None]] * len(rows), "_response": [[row] for row in rows], "_system": nothing,
         "_tools": nothing, "_images": nothing, "_videos": nothing, "_audios": nothing}
    )  # fmt: skip
    columns = ("input_ids", "attention_mask", "position_ids", "labels", "packing_params")
    return [dict(zip(columns, values, strict=True)) for values in zip(*(made[c] for c in columns), strict=True)]


def train(job: dict[str, Any], result: Result) -> None:
    """Take the job's steps."""
    rows, own = read_rows(job["rows"]), dict(job["settings"])
    step_rows = job["batch_rows"]
    is_packed = own.get("neat_packing", False)
    if is_packed:
        firsts = range(0, len(rows), step_rows)
        steps = [packed(rows[first : first + step_rows], own["cutoff_len"], job["pad_id"]) for first in firsts]
        assert {len(step) for step in steps} == {job["packs"]}, [len(step) for step in steps]
        items = [item for step in steps for item in step]
    else:
        items = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    folder = Path(job["work"]) / "rows"
    DatasetDict({"train": Dataset.from_list(items)}).save_to_disk(folder)
    items_a_step = job["packs"] if is_packed else step_rows
    own.setdefault("per_device_train_batch_size", items_a_step)
    batches = items_a_step // own["per_device_train_batch_size"]
    arguments = {
        "stage": "sft", "do_train": True, "dataset": "rows", "model_name_or_path": job["model"], "template": "empty",
        "tokenized_path": str(folder), "output_dir": job["work"], "use_cpu": True, "bf16": job["precision"] == "bf16",
        "learning_rate": job["peak_lr"], "lr_scheduler_type": "constant", "weight_decay": job["weight_decay"],
        "max_grad_norm": job["max_grad_norm"], "gradient_accumulation_steps": batches, "max_steps": job["num_steps"],
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "disable_shuffling": True, "dataloader_pin_memory": False, "finetuning_type": "full", **own,
    }  # fmt: skip
    if job["trains"] != "full":
        arguments |= {"finetuning_type": "lora", "lora_rank": 64, "lora_alpha": 32, "lora_dropout": 0.0,
                      "lora_target": ",".join(job["targets"])}  # fmt: skip
    if job["trains"] == "lora-rows":
        arguments["additional_target"] = "embed_tokens,lm_head"
    run_exp(arguments, callbacks=[watcher(result, batches)])


if __name__ == "__main__":
    run(train)
