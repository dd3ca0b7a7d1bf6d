"""The model card: all that the run recorded and no more, in two languages, in the form the hub reads."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from graftlm.errors import UserError
from graftlm.model.causal import new_causal, save_causal
from graftlm.recipe import Recipe
from graftlm.release.card import card_data, card_text, write_card
from graftlm.release.record import read_run
from graftlm.text.tokenizer import train_base_tokenizer

NASTY = "<script>alert('x')</script> | # [x](javascript:1) `code` **b**\n\n---\nlicense: mit\n\x1b[2J"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def step_line(step: int, loss: float, skipped: bool = False) -> dict[str, Any]:
    return {
        "event": "step", "step": step, "num_updates": step, "loss": loss, "lr": 1e-4, "grad_norm": 1.0,
        "loss_scale": 65536.0 / 2**step, "skipped": skipped, "num_rows": 128, "num_tokens": 1000, "num_targets": 500,
        "seconds": 1800.0,
    }  # fmt: skip


def figures(bits: float, change: float) -> dict[str, Any]:
    return {
        "bits_per_byte": bits, "loss_per_answer_token": 2 * bits, "interval": [bits - 0.1, bits + 0.1],
        "num_rows": 2000, "change_percent": change,
    }  # fmt: skip


def recipe(**changed: Any) -> dict[str, Any]:
    """The original card's road: full, then LoRA, fp16."""
    stage = {"precision": "fp16", "batch_rows": 128, "schedule": "cosine"}
    tree = {
        "name": "seven", "base": {"model": "owner/base-7b"},
        "tokenizer": {"mode": "card", "pieces": "/their/secret/pieces.model"},
        "data": {"sources": [{"path": "owner/belle", "sample": 500_000}, {"path": "/their/secret/own.jsonl"}],
                 "heldout_rows": 2000, "max_tokens": 1024},
        "stages": [
            {**stage, "name": "full", "trains": {"kind": "full"}, "epochs": 1, "peak_lr": 2e-4, "warmup_ratio": 0.01},
            {**stage, "name": "lora", "trains": {"kind": "lora", "rank": 64, "alpha": 32, "dropout": 0.05},
             "epochs": 2, "peak_lr": 2e-5, "warmup_ratio": 0.05},
        ],
    } | changed  # fmt: skip
    return Recipe.model_validate(tree).model_dump(mode="json")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run of which only the recipe is there."""
    run = tmp_path / "run"
    write(run / "recipe.json", {"recipe": recipe(), "versions": {"graftlm": "0.1.0", "torch": "2.13.0"}})
    return run


@pytest.fixture(scope="module")
def tokenizer():
    return train_base_tokenizer(["Below is an instruction that describes a task.", "你好，今天天气很好。"] * 4, 340)


@pytest.fixture
def run(bare: Path, tokenizer) -> Path:
    """A finished one, with an intervention, a skipped step, and a note that tries to act."""
    steps = {
        "1-tokenizer": {}, "2-base": {}, "3-data": {},
        "4-full": {"num_steps": 3, "precision": "fp16", "num_learning_parameters": 6_885_494_784, "kept_step": 3},
        "5-lora": {"num_steps": 3, "precision": "fp16", "num_learning_parameters": 569_131_008},
        "6-model": {"max_logit_difference": 0.03125}, "7-heldout": {},
    }  # fmt: skip
    for name, facts in steps.items():
        machine = "8 x Tesla V100-SXM2-32GB GPU" if "precision" in facts else "some CPU"
        write(bare / name / "done.json", {"key": "k", "seconds": 7200.0, "machine": machine, **facts})
    tokenizer.save(bare / "1-tokenizer")
    write(bare / "1-tokenizer" / "graft.json", {
        "mode": "card", "num_old": 32000, "num_new": 17954, "num_total": 49954, "first_new_id": 32000,
        "num_texts_checked": 4020, "expand_violations": 0, "engine_disagreements": 7, "roundtrip_failures": 0,
        "old_texts_changed": 0, "notes": [NASTY],
    })  # fmt: skip
    write(bare / "2-base" / "grow.json", {
        "num_rows_old": 32000, "num_rows_new": 49954, "embedding_init": "mean", "head_init": "normal",
        "hidden_states_identical": True, "old_logits_identical": True, "max_old_logit_difference": 1.5e-6,
    })  # fmt: skip
    write(bare / "3-data" / "data.json", {
        "rows_read": 510_000, "rows_kept": 497_100, "dropped": {NASTY: 11_000}, "tokens": 9_000_000,
        "labels": 4_000_123, "token_rows": 612_345, "heldout_rows": {"new": 1500, "old": 400},
        "cut": {"longer than the limit: cut at a turn": 77},
    })  # fmt: skip
    lines: list[dict[str, Any]] = [step_line(1, 9.5), step_line(2, 77.0), step_line(3, 88.0)]
    lines.append({"event": "intervention", "step": 1, "number": 1, "at_step": 3, "action": "rollback", "text": NASTY})
    lines += [step_line(2, 5.0, skipped=True), step_line(3, 4.25)]
    lines += [{"event": "heldout", "step": n, "new": figures(3.0 / n, 0), "old": figures(2.0, 0)} for n in (1, 3)]
    lines.append({"event": "note", "step": 3, "text": "stopped early: held-out loss no longer improves"})
    for name in ("4-full", "5-lora"):
        (bare / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_causal(
        new_causal(num_rows=49_954, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8), bare / "6-model"
    )
    write(bare / "7-heldout" / "heldout.json", [
        {"state": "base", "new": figures(7.5, 0.0), "old": figures(1.5, 0.0)},
        {"state": "full", "new": figures(2.5, -66.7), "old": figures(1.6, 6.7)},
        {"state": "model", "new": figures(2.25, -70.0), "old": figures(1.8, 20.0)},
    ])  # fmt: skip
    write(bare / "7-heldout" / "samples.json", [
        {"language": "new", "prompt": [{"role": "user", "content": "中国的首都是哪里？"}], "reference": "",
         "answers": {"base": "?", "model": NASTY}},
    ])  # fmt: skip
    return bare


def halves(text: str) -> tuple[str, str]:
    english, _, chinese = text.partition("\n## 中文\n")
    return english, chinese


def test_it_holds_all_that_the_original_card_holds(run: Path) -> None:
    """Tokenizer, rows, data, both stages with their hyper-parameters, precision, machine, hours, template: twice."""
    for half in halves(card_text(run)):
        for told in (
            "owner/base-7b", "32,000", "17,954", "49,954", "owner/belle", "500,000", "510,000",
            "497,100", "1,900", "11,000", "612,345", "4,000,123", "1,500", "400",
            "| 0.0002 | 2e-05 |", "0.01 |", "0.05 |", "| 1 | 2 |", "| 128 | 128 |", "cosine", "1,024",
            "r64 α32", "6,885,494,784", "569,131,008", "fp16", "8 x Tesla V100-SXM2-32GB GPU", "12.0",
            "2.250 \\[2.150, 2.350\\] (-70.0 %)", "1.800 \\[1.700, 1.900\\] (+20.0 %)", "2,000", "0.03125",
            "9.500 → 4.250", "graftlm chat", "llama-cli",
            "### Instruction:\n\n${content}\n\n### Response:\n\n",
            "Human:${previous question}\nAssistant:${previous answer}\nHuman:${question}\n\n### Response:\n\n",
            "中国的首都是哪里？", "20.0 %",
        ):  # fmt: skip
            assert told in half, told
    english, chinese = halves(card_text(run))
    for told in ("stopped early: held-out loss no longer improves", "rollback: ", "cut between two turns"):
        assert told in english, told
    for told in ("提前停止：留出集损失不再下降", "回退：", "超过长度上限，在两轮之间截断"):
        assert told in chinese, told


def test_both_languages_tell_the_same_numbers(run: Path) -> None:
    """What differs in digits between the halves are the words' own: `95 %`, and headings of Markdown."""
    found = [re.findall(r"\d[\d,.]*\d|\d", half.partition("# seven")[2] or half) for half in halves(card_text(run))]
    assert sorted(found[0]) == sorted(found[1])


def test_what_each_stage_was_trained_by_and_began_with_is_told(run: Path) -> None:
    """The objective is a stage's own; a base from nothing has drawn its weights by the recipe's seed."""
    training = {"name": "pre", "trains": {"kind": "full"}, "objective": "text", "seed": 5}
    scratch = {"text": ["a.txt"], "num_pieces": 400, "training": training}
    write(run / "recipe.json", {"recipe": recipe(base={"scratch": scratch}, seed=17), "versions": {}})
    write(run / "0-scratch" / "done.json", {"key": "k", "seconds": 60.0})
    english, chinese = halves(card_text(run))
    assert "| the loss counts | every token | answers and their ends | answers and their ends |" in english
    assert "| seed | 5 | 0 | 0 |\n| seed of its first weights | 17 | – | – |" in english
    assert "| 计入损失的词元 | 每个词元 | 回答及其结束符 | 回答及其结束符 |" in chinese
    assert "the loss counts answers" not in english


def test_what_was_lossy_on_demand_is_told(run: Path) -> None:
    assert "lossy" not in card_text(run)
    tree = recipe()
    tree["stages"][0] |= {"fp8": True, "precision": "bf16"}
    tree["stages"][1] |= {"frozen_base": "nf4"}
    write(run / "recipe.json", {"recipe": tree, "versions": {}})
    english, chinese = halves(card_text(run))
    assert "| lossy, as asked | linear layers multiplied in FP8 | the frozen base held in nf4 |" in english
    assert "| 按要求启用的有损选项 | 线性层以 FP8 相乘 | 冻结的基座以 nf4 存放 |" in chinese


def test_the_rows_a_state_could_not_read_are_told_beside_its_figures(run: Path) -> None:
    states = json.loads((run / "7-heldout" / "heldout.json").read_text())
    english, chinese = halves(card_text(run))
    assert "| 15.000 | 2,000 |" in english
    assert "not judged by rows" not in english
    states[0]["new"] |= {"num_rows": 1999, "num_left_out": 1}
    write(run / "7-heldout" / "heldout.json", states)
    english, chinese = halves(card_text(run))
    assert "| base | 7.500 \\[7.400, 7.600\\] (+0.0 %) | 15.000 | 1,999 of 2,000 |" in english
    assert "| 4.500 | 2,000 |" in english
    assert "1,999 / 2,000" in chinese
    assert "not judged by rows" in english


def test_a_stage_s_losses_are_means_at_either_end(run: Path) -> None:
    losses = [*[9.0, 7.0, 8.0] * 10, *[1.0, 3.0, 2.0] * 10]
    lines = [json.dumps(step_line(step, loss)) for step, loss in enumerate(losses, 1)]
    (run / "5-lora" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "| 9.500 → 4.250 | 8.000 → 2.000 |" in card_text(run)


def test_the_hub_can_read_its_metadata(run: Path) -> None:
    """`card.validate()` asks the hub itself; here: round trip, required keys, and nothing that the run did not say."""
    card = ModelCard(card_text(run))
    data = card.data.to_dict()
    assert ModelCardData(**data).to_dict() == data
    assert data["license"] == "unknown"
    assert data["language"] == ["zh"]
    assert (data["base_model"], data["datasets"]) == ("owner/base-7b", ["owner/belle"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    results = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert results == {"heldout-new": 2.25, "heldout-old": 1.8}
    assert ModelCard(str(card)).data.to_dict() == data
    assert "not stated" in halves(str(card))[0]
    assert "未说明" in halves(str(card))[1]


def test_licences_come_from_the_recipe(run: Path) -> None:
    written = json.loads((run / "recipe.json").read_text())
    written["recipe"] = recipe(card={"license": "llama2", "data_license": "GPL-3.0, for research"})
    write(run / "recipe.json", written)
    assert card_data(read_run(run)).license == "llama2"
    for half in halves(card_text(run)):
        assert "llama2" in half
        assert "GPL-3.0, for research" in half
    with pytest.raises(ValueError, match="license"):
        recipe(card={"license": "My own!"})


def test_nothing_of_a_run_can_act_or_tell_where_it_lay(run: Path) -> None:
    text = card_text(run)
    assert "<script" not in text
    assert "\x1b" not in text
    assert not re.search(r"(?<!\\)\]\(javascript", text)
    assert "\nlicense: mit" not in text
    assert "/home/" not in text
    assert "own.jsonl" in text
    cells = [line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| what learns")]
    assert cells == [4]


def test_a_run_whose_training_has_not_ended_has_no_card(bare: Path, run: Path) -> None:
    """A card of it would claim stages that never ran."""
    (run / "5-lora" / "done.json").unlink()
    with pytest.raises(UserError, match=r"no finished model yet.*: 5-lora has not ended") as refused:
        card_text(run)
    assert "Run its recipe again" in refused.value.fix
    with pytest.raises(UserError, match="is no run folder"):
        card_text(bare.parent)


def test_what_was_not_recorded_is_called_so(bare: Path) -> None:
    """A run of whose steps nothing is known but that its stages ended."""
    for name in ("4-full", "5-lora"):
        write(bare / name / "done.json", {"key": "k", "seconds": 7200.0})
    english, chinese = halves(card_text(bare))
    for told in ("Not measured.", "Not recorded.", "machine: not recorded"):
        assert told in english
    for told in ("未测量。", "未记录。", "硬件：未记录"):
        assert told in chinese
    assert "curves.svg" not in english
    assert "None" not in english + chinese
    assert "  " not in english[english.index("Limits") :]


def test_the_steps_training_went_back_from_are_not_its_course(run: Path) -> None:
    text = card_text(run)
    assert "77.0" not in text
    assert "88.0" not in text
    assert "1 steps were skipped" not in text
    assert "2 steps were skipped" in text  # one in each stage


def test_its_files_are_written_once_and_its_picture_is_one(run: Path) -> None:
    out = run / "6-model"
    write_card(run, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    write_card(run, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert (out / "README.md").read_text(encoding="utf-8") == card_text(run)
    picture = ElementTree.parse(out / "curves.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert "4-full: loss" in picture.attrib["aria-label"]
    shown = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"held-out, new language", "training", "5-lora: held-out bits per byte"} <= set(shown)
