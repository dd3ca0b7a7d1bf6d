"""GGUF: the real llama.cpp reads our files, encodes as we do and says what we say."""

import json
from pathlib import Path

import pytest
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from graftlm.errors import NumericalStop, UserError
from graftlm.model.tensors import source_of_model, streamed_logits
from graftlm.release import gguf_file
from graftlm.release.export import SAMPLES, export_gguf, sample_rows
from graftlm.release.gguf_file import halved, interleaved, open_gguf, source_of_gguf
from graftlm.release.gguf_vocabulary import pre_tokenizer_name
from graftlm.talk.generate import Chatbot, Sampling, ask
from graftlm.text.dialogue import CARD
from graftlm.text.templates import Template
from graftlm.text.tokenizer import Tokenizer, load_tokenizer, train_base_tokenizer
from graftlm.text.tokenizer.load import tokenizer_of_model
from graftlm.text.tokenizer.ranks import WORD_PATTERN

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp (xllamacpp) is not installed")

TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: what is the capital of France, 12 + 30? ### Response: The capital of France is Paris.",
    "你好，今天天气很好。中国的首都是哪里？北京是中国的首都。Human: Assistant: hello there",
] * 3
ASKED = ("What is the capital of France?", "中国的首都是哪里？", " 12+30 =  ?\n你好 hello 😀 ｆｕｌｌ́")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_SCALING = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Llama-like: bytes for what it does not know, and a padding piece."""
    model = ModelProto()
    model.CopyFrom(train_base_tokenizer(TEXTS, 360).model)
    model.pieces.add(piece="[PAD]", score=0.0, type=ModelProto.SentencePiece.CONTROL)
    return tokenizer_of_model(model)


def byte_level(folder: Path, pattern: str, ignore_merges: bool, bos: str | None) -> Tokenizer:
    """Llama-3- or Qwen-like, with ChatML's pieces, and an id that stands for nothing before the last one."""
    fast = FastTokenizer(models.BPE(ignore_merges=ignore_merges))
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    names = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    fast.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": "<|end|>", **({"bos_token": bos} if bos else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return load_tokenizer(folder)


def small_model(kind: type, num_rows: int, silent: frozenset[int] = frozenset(), **settings):
    """A random model of two layers whose weights are exact in fp16 and whose likeliest piece is clearly so."""
    config = kind(
        vocab_size=num_rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, **settings,
    )  # fmt: skip
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases, norms and large weights, so that a mistake in any of them would be heard.
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_((1.0 if "norm" in name else 0.0) + 0.2 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name or "lm_head" in name else 0.15))
            parameter.copy_(parameter.half().float())
        # Of a trained model no control piece is ever likeliest; we never say one, llama.cpp would.
        model.get_output_embeddings().weight[sorted(silent)] = 0.0
    return model


CASES = {
    "llama": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False, "rope_parameters": PLAIN}),
    "llama-tied-grouped": (LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True,
                                         "rope_parameters": PLAIN, "head_dim": 32, "attention_bias": True}),
    "llama-linear": (LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False,
                                   "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_parameters": PLAIN,
                                "sliding_window": 300}),
    "llama3": (LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False,
                             "rope_parameters": LLAMA3_SCALING}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_parameters": PLAIN,
                            "head_dim": 32}),
}  # fmt: skip


def says_the_same(model, tokenizer, template: Template, path: Path) -> None:
    """T5: prompts, their ids and greedy answers are ours, asked for by ids, by text and through chat."""
    ours = Chatbot(model, tokenizer, template)
    theirs = llama_cpp.LlamaCpp(path, 512)
    for text in (*ASKED, "a  b\n\n\nc\t1234567 don't İstanbul", "鿿𠮷🧑‍🚀 é"):
        assert theirs.encode(text) == tokenizer.encode(text), text
    greedy = Sampling(max_tokens=12)
    for text in ASKED:
        ids = ours.prompt(ask(text), greedy).ids
        expected = [token_id for step in ours.decode([ids], greedy) for _, token_id in step]
        prompt = theirs.prompt([{"role": "user", "content": text}])
        assert theirs.encode(prompt, is_prompt=True) == ids
        assert theirs.say(ids, 12)["tokens"] == expected
        assert theirs.say(prompt, 12)["tokens"] == expected
    asked = [{"role": "user", "content": ASKED[1]}]
    assert theirs.chat(asked, 12).strip("\ufffd \n") == ours.answer(ask(ASKED[1]), greedy).text.strip("\ufffd \n")


@pytest.mark.parametrize("case", ["llama", "llama-tied-grouped", "llama-linear", "mistral"])
def test_llama_cpp_says_what_we_say_with_sentencepiece(sentencepiece: Tokenizer, tmp_path: Path, case: str) -> None:
    """T5, T2: the card's template; 7 rows of padding are not even in the file."""
    kind, settings = CASES[case]
    model = small_model(kind, sentencepiece.num_pieces + 7, sentencepiece.special_ids, **settings)
    manifest = export_gguf(source_of_model(model), sentencepiece, CARD.jinja, tmp_path / "out", name="small")
    assert manifest.max_logit_difference < 1e-4
    assert manifest.files.keys() == {"small-f16.gguf"}
    says_the_same(model, sentencepiece, CARD, tmp_path / "out" / "small-f16.gguf")


@pytest.mark.parametrize(
    ("case", "pattern", "ignore_merges", "bos"),
    [
        ("llama3", WORD_PATTERN, True, "<|begin|>"),
        ("llama3", WORD_PATTERN, False, "<|begin|>"),
        ("qwen2", WORD_PATTERN.replace("{1,3}", ""), False, None),
        ("qwen3", WORD_PATTERN.replace("{1,3}", ""), False, None),
    ],
)
def test_llama_cpp_says_what_we_say_with_byte_level_pieces(
    tmp_path: Path, case: str, pattern: str, ignore_merges: bool, bos: str | None
) -> None:
    """T5: ChatML, whose answers end with a token other than eos and whose prompts begin without bos."""
    tokenizer = byte_level(tmp_path / "tokenizer", pattern, ignore_merges, bos)
    kind, settings = CASES[case]
    model = small_model(kind, tokenizer.num_pieces + 3, tokenizer.special_ids, **settings)
    export_gguf(source_of_model(model), tokenizer, CHATML, tmp_path / "out", name="small")
    says_the_same(model, tokenizer, Template("chatml", CHATML, "all"), tmp_path / "out" / "small-f16.gguf")


def test_eight_bits_are_near_and_llama_cpp_reads_them(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    kind, settings = CASES["llama"]
    model = small_model(kind, sentencepiece.num_pieces, **settings)
    source = source_of_model(model)
    out = tmp_path / "out"
    manifest = export_gguf(source, sentencepiece, CARD.jinja, out, name="small", quantization="q8_0")
    rows = sample_rows(SAMPLES, sentencepiece, CARD)
    spread = max(logits.std().item() for logits in streamed_logits(source, rows))
    assert 0 < manifest.max_logit_difference < spread / 2
    assert 0 < manifest.mean_divergence < 0.1
    assert 0 <= manifest.num_likeliest_changed < manifest.num_compared_tokens / 10
    theirs = llama_cpp.LlamaCpp(out / "small-q8_0.gguf", 256)
    loaded, _ = source_of_gguf(out / "small-q8_0.gguf", model.config, sentencepiece.num_pieces)
    (logits_TV,) = streamed_logits(loaded, rows[:1])
    assert theirs.say(rows[0], 1)["tokens"] == [logits_TV[-1].argmax().item()]


def test_eight_bits_further_off_than_rounding_are_no_export(monkeypatch) -> None:
    """N4: one number wrong in one block, beyond the bound that the form itself sets; denormal scales keep to it too."""
    torch.manual_seed(1)
    rows = (torch.randn(64, 64) * torch.logspace(-12, 4, 64)[:, None]).numpy()
    quantize = gguf_file.gguf.quantize
    assert gguf_file._eight_bits("w", rows).shape == quantize(rows, gguf_file.Kind.Q8_0).shape

    def careless(rows, kind):
        stored = quantize(rows, kind).copy()
        stored[7, 2 + 5] += 1  # one step, of the sixth number behind the scale
        return stored

    monkeypatch.setattr(gguf_file.gguf, "quantize", careless)
    with pytest.raises(AssertionError, match="w in 8 bits lies further"):
        gguf_file._eight_bits("w", rows[-8:])


def test_heads_are_reordered_and_back() -> None:
    matrix = torch.arange(24.0).view(8, 3)
    assert interleaved(matrix, 2)[:, 0].tolist() == [0.0, 6.0, 3.0, 9.0, 12.0, 18.0, 15.0, 21.0]
    assert torch.equal(halved(interleaved(matrix, 2), 2), matrix)
    bias = torch.arange(8.0)
    assert torch.equal(halved(interleaved(bias, 2), 2), bias)


@pytest.fixture(scope="module")
def file(sentencepiece: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind, settings = CASES["llama"]
    out = tmp_path_factory.mktemp("gguf") / "out"
    model = small_model(kind, sentencepiece.num_pieces, **settings)
    export_gguf(source_of_model(model), sentencepiece, CARD.jinja, out, name="small")
    return out / "small-f16.gguf"


@pytest.mark.parametrize("kept", [0, 3, 30, 500, 5_000, 12_000, -1])
def test_a_file_cut_short_is_told(file: Path, tmp_path: Path, kept: int) -> None:
    """C9: cut in the magic, the header, the pieces, the tensor list and the last tensor."""
    content = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[:kept])
    with pytest.raises(UserError, match=r"cut\.gguf .*(whole GGUF file|header tells)"):
        open_gguf(cut)
    assert open_gguf(file).keys() >= {"token_embd.weight", "output.weight"}


@pytest.mark.parametrize(("place", "told"), [(0, "magic"), (4, "version"), (8, "cut short or damaged")])
def test_a_damaged_or_foreign_file_is_told(file: Path, tmp_path: Path, place: int, told: str) -> None:
    """C9: another kind of file, another version, a count of tensors beyond the file."""
    content = bytearray(file.read_bytes())
    content[place : place + 4] = b"\x77\x77\x77\x07"
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(UserError, match=told):
        open_gguf(tmp_path / "bad.gguf")


def test_what_llama_cpp_cannot_do_exactly_is_refused(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    """Nothing is written of a model or tokenizer that would behave otherwise there."""

    def refused(model, tokenizer, told: str) -> None:
        with pytest.raises(UserError, match=told) as error:
            export_gguf(source_of_model(model), tokenizer, CARD.jinja, tmp_path / "out", name="small")
        assert "--to hf" in error.value.fix
        assert list(tmp_path.glob("*out*")) == []

    kind, settings = CASES["llama"]
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    num = sentencepiece.num_pieces
    refused(small_model(kind, num, **{**settings, "rope_parameters": yarn}), sentencepiece, "scaling 'yarn'")
    without = Tokenizer(sentencepiece.engine, roles=sentencepiece.roles)
    refused(small_model(kind, num, **settings), without, "no tokenizer.model")
    unigram = ModelProto()
    unigram.CopyFrom(sentencepiece.model)
    unigram.trainer_spec.model_type = 1
    refused(small_model(kind, num, **settings), tokenizer_of_model(unigram), "Unigram")


def test_an_unknown_word_pattern_is_refused() -> None:
    parts = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\w+"}}, "model": {}}
    with pytest.raises(UserError, match="no word pattern"):
        pre_tokenizer_name(parts)
    gpt2 = {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}, "model": {"ignore_merges": False}}
    assert pre_tokenizer_name(gpt2) == "gpt-2"


def test_a_number_beyond_half_precision_is_told(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    kind, settings = CASES["llama"]
    model = small_model(kind, sentencepiece.num_pieces, **settings)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 70_000.0
    with pytest.raises(NumericalStop, match=r"layers\.1\.mlp\.up_proj\.weight holds 70000, which is beyond float16"):
        export_gguf(source_of_model(model), sentencepiece, CARD.jinja, tmp_path / "out", name="small")
    assert list(tmp_path.iterdir()) == []
