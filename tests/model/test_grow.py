"""Growing: rows placed by id, nothing old changed, every initialisation as it says, mistakes told."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from graftlm.errors import UserError
from graftlm.model.causal import (
    head_weight,
    is_tied,
    load_causal,
    new_causal,
    save_causal,
)
from graftlm.model.grow import expand_model, grow_embeddings
from graftlm.model.row_init import INITS
from graftlm.text.tokenizer import Tokenizer, load_tokenizer, train_base_tokenizer
from graftlm.text.tokenizer.load import tokenizer_of_model

ENGLISH = ["the cat sat on the mat and the dog ran", "we read a long book about the old sea", "rain falls"] * 4
CHINESE = ["你好世界", "世界你好你好"]
NEW_PIECES = ("你好", "世界", "你", "好", "世", "界")


def with_pieces(tokenizer: Tokenizer, pieces=NEW_PIECES, pad=True) -> Tokenizer:
    """The tokenizer with pieces appended and a pad piece after them, as public merges are made."""
    model = ModelProto()
    model.CopyFrom(tokenizer.model)
    for number, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-1000.0 - number, type=ModelProto.SentencePiece.NORMAL)
    if pad:
        model.pieces.add(piece="[PAD]", score=0.0, type=ModelProto.SentencePiece.CONTROL)
    return tokenizer_of_model(model)


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    return train_base_tokenizer(ENGLISH, 300)


@pytest.fixture(scope="module")
def new(old) -> Tokenizer:
    return with_pieces(old)


def model_for(num_rows, *, is_tied=False, dtype=torch.float32):
    model = new_causal(
        num_rows=num_rows, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, is_tied=is_tied, seed=5
    )
    with torch.no_grad():  # a trained head's rows share a large part
        model.get_output_embeddings().weight.add_(0.05 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    return model.to(dtype)


def vectors_file(folder, old, new, skip=()):
    """Auxiliary vectors in which 你好 lies on the piece `the`, and the rest nowhere near."""
    generator = torch.Generator().manual_seed(0)
    pieces = [new.piece(i) for i in range(new.num_pieces)]
    vectors = {p: torch.randn(16, generator=generator) for p in pieces if p not in skip and p != "[PAD]"}
    vectors["你好"] = 3 * vectors["▁the"]
    save_file(vectors, folder / "vectors.safetensors")
    return folder / "vectors.safetensors"


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [0, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_old_changes(old, new, tmp_path, init, tied, padding, dtype):
    """T4: old rows and hidden states bit for bit, old logits bit for bit or within rounding, padded bases too."""
    num_old, num_rows_old = old.num_pieces, old.num_pieces + padding
    model = model_for(num_rows_old, is_tied=tied, dtype=dtype).eval()
    before = model.get_input_embeddings().weight.clone(), head_weight(model).clone()
    ids = torch.tensor([old.encode("the cat ran about the sea")])
    with torch.no_grad():
        logits = model(ids).logits[..., :num_old]
    path = vectors_file(tmp_path, old, new) if init == "similarity" else None
    report = grow_embeddings(model, old, new, init, init, 0, path, new_texts=CHINESE)
    after = model.get_input_embeddings().weight, head_weight(model)
    assert report.num_rows_new == max(num_rows_old, new.num_pieces) == model.config.vocab_size
    for was, now in zip(before, after, strict=True):
        assert now.dtype == dtype
        assert len(now) == report.num_rows_new
        assert torch.equal(now[:num_old], was[:num_old])
        assert torch.equal(now[new.num_pieces :], was[new.num_pieces :])
        assert (now[num_old : new.num_pieces].float().norm(dim=1) > 0).all()
    with torch.no_grad():
        grown = model(ids).logits[..., :num_old]
    assert (grown.float() - logits.float()).abs().max() <= report.old_logit_tolerance
    assert report.hidden_states_identical
    assert report.old_logits_identical
    assert report.max_old_logit_difference <= report.old_logit_tolerance
    assert is_tied(model) is tied is (head_weight(model) is model.get_input_embeddings().weight)
    assert report.first_loss["uniform"] == math.log(report.num_rows_new)
    assert report.first_loss["new_text_new_targets"] > 0


def test_each_initialisation_is_what_it_says(old, new, tmp_path):
    """Rows of 你好 computed here by hand, from its expansion."""
    num_old = old.num_pieces
    new_id = new.encode_continuation("你好")[-1]
    assert new.piece(new_id) == "你好"
    expansion = old.encode_continuation("你好")
    assert len(expansion) == 6  # bytes

    def grown(init, seed=0, vectors=None):
        model = model_for(num_old)
        old_VH = head_weight(model).detach().clone()
        grow_embeddings(model, old, new, "mean", init, seed, vectors)
        return old_VH, head_weight(model).detach()

    old_VH, now = grown("mean")
    torch.testing.assert_close(now[num_old:], old_VH.mean(0).expand(len(NEW_PIECES) + 1, -1))
    old_VH, now = grown("subpiece-mean")
    torch.testing.assert_close(now[new_id], old_VH[expansion].mean(0))
    torch.testing.assert_close(now[new.pad_id], old_VH.mean(0))
    old_VH, now = grown("subpiece-mean-norm")
    away = now[num_old : new.pad_id] - old_VH.mean(0)
    typical = (old_VH - old_VH.mean(0)).square().mean(1).sqrt().median()
    torch.testing.assert_close(away.square().mean(1).sqrt(), typical.expand(len(NEW_PIECES)))
    unscaled = old_VH[expansion].mean(0) - old_VH.mean(0)
    assert torch.cosine_similarity(away[new_id - num_old], unscaled, dim=0) > 0.999
    old_VH, now = grown("normal")
    assert abs(now[num_old:].std().item() - 0.02) < 0.004
    assert torch.equal(grown("normal")[1], now)
    assert not torch.equal(grown("normal", seed=1)[1], now)
    old_VH, now = grown("similarity", vectors=vectors_file(tmp_path, old, new, skip=("世",)))
    the = old_VH[old.encode("the")[0]]
    assert torch.cosine_similarity(now[new_id], the, dim=0) > torch.cosine_similarity(old_VH, the[None]).median()
    without = new.encode_continuation("世")[-1]
    torch.testing.assert_close(now[without], old_VH[old.encode_continuation("世")].mean(0))


def test_row_rms_tells_mean_rows_are_short(old, new):
    model = model_for(old.num_pieces)
    report = grow_embeddings(model, old, new, "mean", "subpiece-mean-norm", 0)
    assert report.row_rms["embedding"]["new"] < 0.3 * report.row_rms["embedding"]["old"]
    assert report.row_rms["head"]["new"] == pytest.approx(report.row_rms["head"]["old"], rel=0.15)


def test_expand_writes_a_folder_that_loads(old, new, tmp_path):
    base = tmp_path / "base"
    save_causal(model_for(old.num_pieces), base, also=old.save)
    new.save(tmp_path / "tokenizer")
    report = expand_model(base, tmp_path / "tokenizer", "subpiece-mean", tmp_path / "grown", max_shard="20KB")
    grown = load_causal(tmp_path / "grown")
    assert len(head_weight(grown)) == new.num_pieces == report.num_rows_new
    assert load_tokenizer(tmp_path / "grown").fingerprint == new.fingerprint
    assert json.loads((tmp_path / "grown" / "grow.json").read_text())["num_rows_old"] == old.num_pieces
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"], config["eos_token_id"]) == (new.num_pieces, new.pad_id, 2)


def test_nothing_to_graft_leaves_the_model_as_it_was(old, tmp_path):
    model = model_for(old.num_pieces)
    before = head_weight(model).clone()
    report = grow_embeddings(model, old, old, "subpiece-mean", "subpiece-mean", 0)
    assert torch.equal(head_weight(model), before)
    assert report.row_rms["head"]["new"] is None


def test_more_ids_than_rows_is_told_before_any_work(old, tmp_path):
    """T1: the base's own tokenizer has an id more than the base has rows."""
    save_causal(model_for(old.num_pieces - 1), tmp_path / "base", also=old.save)
    old.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="300 ids, the model 299 rows: 1 too few"):
        expand_model(tmp_path / "base", tmp_path / "tokenizer", "mean", tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize(("wanted", "text"), [("foreign", "is no extension"), ("smaller", "is no extension")])
def test_a_tokenizer_that_does_not_extend_the_base_is_refused(old, tmp_path, wanted, text):
    """T1: ids that mean something else, or fewer of them."""
    other = train_base_tokenizer(["zebra quartz jumps over vexed wizards"] * 4, 300 if wanted == "foreign" else 280)
    save_causal(model_for(old.num_pieces), tmp_path / "base", also=old.save)
    other.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=text) as error:
        expand_model(tmp_path / "base", tmp_path / "tokenizer", "mean", tmp_path / "grown")
    assert "tokenizer graft" in error.value.fix


def test_mistaken_initialisations_are_told(old, new, tmp_path):
    model = model_for(old.num_pieces)
    with pytest.raises(UserError, match="No initialisation is called 'avg'") as error:
        grow_embeddings(model, old, new, "avg", "mean", 0)
    assert "subpiece-mean-norm" in error.value.fix
    with pytest.raises(UserError, match="needs auxiliary vectors"):
        grow_embeddings(model, old, new, "mean", "similarity", 0)
    with pytest.raises(UserError, match="cannot start as mean and normal"):
        grow_embeddings(model_for(old.num_pieces, is_tied=True), old, new, "mean", "normal", 0)
    save_file({"a": torch.zeros(3), "b": torch.zeros(4)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="vector of equal length"):
        grow_embeddings(model, old, new, "mean", "similarity", 0, tmp_path / "odd.safetensors")
    save_file({"zzz": torch.ones(3)}, tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="none belongs to an old piece"):
        grow_embeddings(model, old, new, "mean", "similarity", 0, tmp_path / "none.safetensors")


@pytest.mark.slow
def test_the_real_base_grows_to_the_cards_size(shared_real, tmp_path):
    """49,953 pieces and 49,954 with the pad piece; old logits of the real base unmoved."""
    base = load_tokenizer(shared_real / "english-base")
    inventory = ModelProto()
    inventory.ParseFromString((shared_real / "tokenizers" / "chinese_sp.model").read_bytes())
    have = {piece.piece for piece in base.model.pieces}
    added = [piece.piece for piece in inventory.pieces if piece.type == 1 and piece.piece not in have]
    assert with_pieces(base, added, pad=False).num_pieces == 49_953
    with_pieces(base, added).save(tmp_path / "tokenizer")
    report = expand_model(shared_real / "english-base", tmp_path / "tokenizer", "subpiece-mean", tmp_path / "grown")
    assert (report.num_rows_old, report.num_rows_new) == (32_000, 49_954)
    assert report.max_old_logit_difference <= report.old_logit_tolerance


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("model.embed_tokens.weight", 290, "in row 290, the piece {piece!r}"),
        ("lm_head.weight", 290, "in row 290, the piece {piece!r}"),
        ("model.embed_tokens.weight", 302, "in row 302, which no piece has"),
        ("model.layers.1.mlp.down_proj.weight", 3, "model.layers.1.mlp.down_proj.weight"),
        ("model.norm.weight", 0, "model.norm.weight"),
    ],
)
def test_a_base_with_weights_that_are_not_finite_is_refused_by_tensor_and_row(
    old, new, tmp_path, name, row, told, value, is_tied
):
    """C2: a broken input (exit 2), told before anything grows or trains."""
    model = model_for(old.num_pieces + 4, is_tied=is_tied)
    model.get_parameter("model.embed_tokens.weight" if is_tied and "lm_head" in name else name).data[row] = value
    save_causal(model, tmp_path / "base", also=old.save)
    new.save(tmp_path / "new")
    with pytest.raises(UserError) as refusal:
        expand_model(tmp_path / "base", tmp_path / "new", "mean", tmp_path / "out")
    assert refusal.value.exit_code == 2
    assert told.format(piece=old.name_of(row)) in refusal.value.problem
    assert "fetch the model again" in refusal.value.fix
    assert not (tmp_path / "out").exists()


def test_several_bad_rows_are_counted(old, new, tmp_path):
    model = model_for(old.num_pieces)
    model.model.embed_tokens.weight.data[[7, 9]] = math.nan
    model.model.norm.weight.data[:] = math.inf
    save_causal(model, tmp_path / "base", also=old.save)
    new.save(tmp_path / "new")
    with pytest.raises(UserError, match=r"in 2 rows, first row 7, the piece .*, and 1 more of its tensors do"):
        expand_model(tmp_path / "base", tmp_path / "new", "mean", tmp_path / "out")


def test_a_base_whose_activations_are_not_finite_grows_all_the_same(old, new, tmp_path):
    """Its weights are finite: which layer is to blame is told by pre-flight."""
    model = model_for(old.num_pieces)
    for name in ("q_proj", "k_proj"):
        model.get_submodule(f"model.layers.1.self_attn.{name}").weight.data.mul_(1e21)
    report = grow_embeddings(model, old, new, "mean", "mean", 0)
    assert report.hidden_states_identical
    assert report.old_logits_identical
    assert "old_text" not in report.first_loss
