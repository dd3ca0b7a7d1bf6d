"""TRL's arm of `bench/cpu.py`: its SFTTrainer on the rows and weights of the job. Runs in TRL's environment.

Rows come as ids and labels. Where its own packing is asked for, TRL packs the rows of each step, so that a step holds
the rows it holds in every arm. Settings are those of SFTConfig; what is not named keeps its default.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from measure import Result, read_rows, run, watcher
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, pack_dataset  # pyright: ignore[reportMissingImports]


def train(job: dict[str, Any], result: Result) -> None:
    """Take the job's steps."""
    rows, own = read_rows(job["rows"]), dict(job["settings"])
    device = job.get("device", "cpu")
    step_rows = job["batch_rows"]
    is_packed = own.get("packing", False)
    if is_packed:
        steps = [Dataset.from_list(rows[start : start + step_rows]) for start in range(0, len(rows), step_rows)]
        packed = [pack_dataset(step, own["max_length"], "bfd") for step in steps]
        assert {len(step) for step in packed} == {job["packs"]}, [len(step) for step in packed]
        data = concatenate_datasets(packed)
    else:
        data = Dataset.from_list(rows)
    items = job["packs"] if is_packed else step_rows
    own.setdefault("per_device_train_batch_size", items)
    batches = items // own["per_device_train_batch_size"]
    settings = SFTConfig(
        output_dir=job["work"], use_cpu=device == "cpu", bf16=job["precision"] == "bf16", learning_rate=job["peak_lr"],
        lr_scheduler_type="constant", weight_decay=job["weight_decay"], max_grad_norm=job["max_grad_norm"],
        gradient_accumulation_steps=batches, max_steps=job["num_steps"], logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, train_sampling_strategy="sequential", dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True}, **own,
    )  # fmt: skip
    adapter = None
    if job["trains"] != "full":
        adapter = LoraConfig(
            r=64, lora_alpha=32, lora_dropout=0.0, target_modules=job["targets"], bias="none", task_type="CAUSAL_LM",
            modules_to_save=["embed_tokens", "lm_head"] if job["trains"] == "lora-rows" else None,
        )  # fmt: skip
    if job.get("is_drawn", False):  # the folder holds a config and no weights
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"]), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=data, peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[watcher(result, batches)],
    )  # fmt: skip
    trainer.train()
    result.facts["optimizer"] = str(settings.optim)


if __name__ == "__main__":
    run(train)
