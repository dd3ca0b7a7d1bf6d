"""Export: what plain transformers and plain PEFT load is the trained model, its tokenizer and its template."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftlm.errors import UserError
from graftlm.model.causal import load_causal, new_causal, save_causal
from graftlm.model.lora import attach_lora, merge_lora
from graftlm.model.rows import join_rows, parameter_groups_by_role, split_rows
from graftlm.model.tensors import source_of_folder, source_of_model
from graftlm.release.export import export_adapter, export_model, whole_or_absent
from graftlm.text.dialogue import CARD, Conversation, Message, render
from graftlm.text.tokenizer import load_tokenizer, train_base_tokenizer
from graftlm.text.tokenizer.load import tokenizer_of_model

TEXTS = ["below is an instruction that describes a task", "write a response that completes the request"] * 4
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A small base tokenizer with [PAD] and ChatML's two control pieces."""
    model = ModelProto()
    model.CopyFrom(train_base_tokenizer(TEXTS, 300).model)
    for piece in ("[PAD]", "<|im_start|>", "<|im_end|>"):
        model.pieces.add(piece=piece, score=0.0, type=ModelProto.SentencePiece.CONTROL)
    return tokenizer_of_model(model)


def small_model(num_rows, is_tied=False):
    return new_causal(
        num_rows=num_rows, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, is_tied=is_tied
    )


def learn(model):
    """Move adapters and rows away from where they began."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for named in parameter_groups_by_role(model).values():
            for _, parameter in named:
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_transformers_loads_the_export(tokenizer, tmp_path, tied, dtype):
    model = learn(small_model(tokenizer.num_pieces + 5, tied)).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    manifest = export_model(
        source_of_model(model), tokenizer, CARD.jinja, tmp_path / "out", dtype=dtype, max_shard_bytes=20_000
    )
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert len([name for name in manifest.files if name.endswith(".safetensors")]) > 1
    assert manifest.max_logit_difference <= {torch.float32: 1e-6, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    assert (manifest.max_logit_difference > 0) is (dtype != torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert plain.dtype == dtype
    ids = torch.tensor([tokenizer.encode("write a response")])
    with torch.no_grad():
        difference = (plain.float()(ids).logits - model(ids).logits).abs().max()
    assert difference <= max(2 * manifest.max_logit_difference, 1e-6)


def test_the_exported_template_yields_the_cards_prompt(tokenizer, tmp_path):
    export_model(source_of_model(small_model(tokenizer.num_pieces)), tokenizer, CARD.jinja, tmp_path / "out")
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "write a task"}]
    expected = (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n\nwrite a task\n\n### Response:\n\n"
    )
    assert plain.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == expected
    found = plain.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    ours = render(Conversation((Message("user", "write a task"),)), tokenizer, CARD, for_reply=True)
    assert found == ours.ids
    loaded = load_tokenizer(tmp_path / "out")
    assert loaded.fingerprint == tokenizer.fingerprint


def test_rows_beyond_the_tokenizer_are_never_sampled(tokenizer, tmp_path):
    """T2: padding rows win every soft-max here, and plain generate never picks one."""
    model = small_model(tokenizer.num_pieces + 5)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.get_output_embeddings().weight[tokenizer.num_pieces :] = 0.0
        model.get_output_embeddings().weight[: tokenizer.num_pieces] *= 1e-3
        for row in range(5):  # whatever the hidden state, one of five opposite rows is far above all others
            direction = torch.randn(32, generator=torch.Generator().manual_seed(row // 2)) * (-1) ** row
            model.get_output_embeddings().weight[tokenizer.num_pieces + row] = direction
    export_model(source_of_model(model), tokenizer, CARD.jinja, tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer.encode("write a response")])
    with torch.no_grad():
        assert plain(ids).logits[0, -1].argmax() >= tokenizer.num_pieces, "padding does not win: nothing is tested"
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(range(tokenizer.num_pieces, tokenizer.num_pieces + 5)) <= set(told["suppress_tokens"])
    for sampling in ({}, {"do_sample": True, "temperature": 5.0}):
        answer = plain.generate(ids, max_new_tokens=20, min_new_tokens=20, **sampling)[0, ids.shape[1] :]
        assert (answer < tokenizer.num_pieces).all()
        assert not set(answer.tolist()) & {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id}


def test_generation_stops_where_the_template_ends_an_answer(tokenizer, tmp_path):
    export_model(source_of_model(small_model(tokenizer.num_pieces)), tokenizer, CHATML, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told["eos_token_id"] == sorted([tokenizer.eos_id, tokenizer.special_tokens["<|im_end|>"]])
    assert tokenizer.pad_id in told["suppress_tokens"]
    export_model(source_of_model(small_model(tokenizer.num_pieces)), tokenizer, CARD.jinja, tmp_path / "card")
    told = json.loads((tmp_path / "card" / "generation_config.json").read_text())
    assert told["eos_token_id"] == tokenizer.eos_id


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_merged_or_kept_with_the_same_logits(tokenizer, tmp_path, tied):
    """N4: merged = adapter = what plain PEFT loads, trained rows included."""
    save_causal(small_model(tokenizer.num_pieces, tied), tmp_path / "base")
    model = attach_lora(load_causal(tmp_path / "base"), rank=4, alpha=8)
    split_rows(model, 290)
    for role in ("old_rows", "new_rows"):
        for _, parameter in parameter_groups_by_role(model)[role]:
            parameter.requires_grad_(True)
    learn(model).eval()
    ids = torch.tensor([tokenizer.encode("write a response that completes the request")])
    with torch.no_grad():
        trained = model(ids).logits
    manifest = export_adapter(model, tokenizer, CARD.jinja, tmp_path / "adapter", tmp_path / "base")
    assert manifest.max_logit_difference < 1e-4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert (base(ids).logits - trained).abs().max() > 0.05, "the adapter does nothing: nothing is tested"
        plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert (plain(ids).logits - trained).abs().max() < 1e-4
    merged = merge_lora(model)
    join_rows(merged)
    manifest = export_model(source_of_model(merged), tokenizer, CARD.jinja, tmp_path / "merged", dtype=torch.float32)
    assert manifest.max_logit_difference < 1e-4
    with torch.no_grad():
        assert (AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits - trained).abs().max() < 1e-4


def test_a_folder_may_be_given(tokenizer, tmp_path):
    save_causal(small_model(tokenizer.num_pieces), tmp_path / "trained")
    manifest = export_model(
        source_of_folder(tmp_path / "trained"), tokenizer, CARD.jinja, tmp_path / "out", dtype=torch.float32
    )
    assert manifest.max_logit_difference == 0
    assert manifest.files.keys() >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tokenizer, tmp_path):
    """T1: told before anything is written."""
    with pytest.raises(UserError, match="303 ids, the model 302 rows"):
        export_model(source_of_model(small_model(tokenizer.num_pieces - 1)), tokenizer, CARD.jinja, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HISTORY = [("user", "write a task"), ("assistant", "a task"), ("user", "describe a request")]


def test_an_export_is_whole_or_absent(tokenizer, tmp_path):
    """Interrupted while it is written or checked, it leaves nothing; what an earlier kill left is cleared away."""
    out, source = tmp_path / "out", source_of_model(small_model(tokenizer.num_pieces))
    (tmp_path / ".out.unchecked").mkdir()
    (tmp_path / ".out.unchecked" / "model.safetensors").write_bytes(b"half")

    def interrupted(scratch):
        export_model(source, tokenizer, CARD.jinja, scratch)
        assert scratch.is_dir()
        assert not out.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_or_absent(out, interrupted)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()  # an empty folder may be given
    manifest = whole_or_absent(out, lambda scratch: export_model(source, tokenizer, CARD.jinja, scratch))
    assert {path.name for path in out.iterdir()} == {*manifest.files, "manifest.json"}
    with pytest.raises(UserError, match="already holds files"):
        whole_or_absent(out, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FRAME = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n\n{}\n\n### Response:\n\n"
)
STRANGER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
hf, base, adapter = sys.argv[1:4]
history = [{"role": role, "content": content} for role, content in json.loads(sys.argv[4])]
tokenizer = AutoTokenizer.from_pretrained(hf)
template = tokenizer.apply_chat_template
prompts = [template(asked, tokenize=False, add_generation_prompt=True) for asked in (history[:1], history)]
ids = template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
with torch.no_grad():
    merged = AutoModelForCausalLM.from_pretrained(hf)(ids).logits
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(ids).logits
print(json.dumps({"prompts": prompts, "ids": ids[0].tolist(), "last": merged[0, -1].tolist(),
    "difference": (merged - adapted).abs().max().item(), "graftlm": "graftlm" in sys.modules}))
"""


def test_a_process_without_graftlm_loads_both_exports_and_gets_the_cards_prompts(tokenizer, tmp_path):
    """One turn and history, byte for byte; the merged folder and the adapter on its base say the same."""
    save_causal(small_model(tokenizer.num_pieces), tmp_path / "base")
    model = learn(attach_lora(load_causal(tmp_path / "base"), rank=4, alpha=8)).eval()
    export_adapter(model, tokenizer, CARD.jinja, tmp_path / "adapter", tmp_path / "base")
    conversation = Conversation(tuple(Message(role, content) for role, content in HISTORY))
    ids = render(conversation, tokenizer, CARD, for_reply=True).ids
    with torch.no_grad():
        trained = model(torch.tensor([ids])).logits[0, -1]
    export_model(source_of_model(merge_lora(model)), tokenizer, CARD.jinja, tmp_path / "hf", dtype=torch.float32)
    folders = [str(tmp_path / name) for name in ("hf", "base", "adapter")]
    told = subprocess.run(
        [sys.executable, "-c", STRANGER, *folders, json.dumps(HISTORY)], capture_output=True, text=True, check=True
    )
    found = json.loads(told.stdout)
    history = "Human:write a task\nAssistant:a task\nHuman:describe a request"
    assert found["prompts"] == ["<s>" + FRAME.format("write a task"), "<s>" + FRAME.format(history)]
    assert found["ids"] == ids
    assert (torch.tensor(found["last"]) - trained).abs().max() < 1e-5
    assert found["difference"] < 1e-4
    assert not found["graftlm"]
