"""First values of new rows, against each formula written out; vectors that cannot be used are told."""

import pytest
import torch
from safetensors.torch import save_file

from graftlm.errors import UserError
from graftlm.model import row_init
from graftlm.model.row_init import Neighbours, find_neighbours, read_vectors, row_rms, start_rows

OLD = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 0.5
EXPANSIONS = [(3,), (4, 5, 5), (), (7, 8), (0, 1, 2, 3)]


def rows(init: str, seed: int = 0, neighbours: Neighbours | None = None, old: torch.Tensor = OLD) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return start_rows(init, old, EXPANSIONS, std=0.02, generator=generator, neighbours=neighbours)


@pytest.fixture(params=[2048, 2])
def chunks(request, monkeypatch) -> None:
    """However many rows are gathered at a time."""
    monkeypatch.setattr(row_init, "_CHUNK_ROWS", request.param)


@pytest.mark.usefixtures("chunks")
def test_subpiece_mean_and_mean() -> None:
    """A piece seen twice counts twice; a piece without expansion starts as the mean of all."""
    by_hand = [OLD[list(expansion)].mean(0) if expansion else OLD.mean(0) for expansion in EXPANSIONS]
    torch.testing.assert_close(rows("subpiece-mean"), torch.stack(by_hand))
    torch.testing.assert_close(rows("mean"), OLD.mean(0).expand(5, -1))


@pytest.mark.usefixtures("chunks")
def test_norm_matched_rows_lie_as_far_from_the_mean_as_old_ones() -> None:
    typical = row_rms(OLD, OLD.mean(0)).median()
    away = rows("subpiece-mean-norm") - OLD.mean(0)
    is_expanded = torch.tensor([bool(expansion) for expansion in EXPANSIONS])
    torch.testing.assert_close(row_rms(away)[is_expanded], typical.expand(4))
    assert row_rms(away)[~is_expanded].max() < 1e-5 or row_rms(away)[~is_expanded].allclose(typical)
    plain = rows("subpiece-mean") - OLD.mean(0)
    assert (torch.cosine_similarity(away, plain)[is_expanded] > 0.9999).all()


def test_normal_rows_follow_their_seed() -> None:
    wide = start_rows("normal", OLD, [()] * 3000, std=0.02, generator=torch.Generator().manual_seed(0))
    assert wide.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(rows("normal"), rows("normal"))
    assert not torch.equal(rows("normal"), rows("normal", seed=1))


@pytest.mark.usefixtures("chunks")
def test_similar_rows_are_the_weighted_neighbours_else_the_subpieces() -> None:
    ids = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]])
    weights = torch.tensor([[0.25, 0.75]] * 5)
    known = torch.tensor([True, True, True, False, True])
    found = rows("similarity", neighbours=Neighbours(ids, weights, known))
    expected = 0.25 * OLD[ids[:, 0]] + 0.75 * OLD[ids[:, 1]]
    torch.testing.assert_close(found[known], expected[known])
    torch.testing.assert_close(found[3], OLD[[7, 8]].mean(0))


@pytest.mark.parametrize("init", ["mean", "subpiece-mean", "subpiece-mean-norm"])
def test_rows_are_computed_in_float32_whatever_the_base_holds(init) -> None:
    found = rows(init, old=OLD.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rows(init, old=OLD.bfloat16().float()))


@pytest.mark.usefixtures("chunks")
def test_neighbours_are_the_ten_nearest_by_soft_max_of_cosine() -> None:
    """Against the formula written out, at temperature 0.1."""
    generator = torch.Generator().manual_seed(0)
    pieces = [f"p{i}" for i in range(30)]
    vectors = {piece: torch.randn(8, generator=generator) for piece in [*pieces, "n", "m", "o"]}
    found = find_neighbours(vectors, [*pieces, "without"], ["unknown", "n", "m", "o"])
    assert found.is_known_N.tolist() == [False, True, True, True]
    for place, piece in ((1, "n"), (3, "o")):
        cosines = torch.stack([torch.cosine_similarity(vectors[piece], vectors[p], dim=0) for p in pieces])
        values, places = cosines.sort(descending=True)
        assert found.ids_NK[place].tolist() == places[:10].tolist()
        torch.testing.assert_close(found.weights_NK[place], (values[:10] / 0.1).softmax(0))


def test_vectors_that_cannot_be_used_are_told(tmp_path) -> None:
    with pytest.raises(UserError, match="no file of auxiliary vectors"):
        read_vectors(tmp_path / "none.safetensors")
    for tensors, told in (
        ({}, "is empty"),
        ({"a": torch.zeros(3), "b": torch.zeros(2, 3)}, r"'b' has the shape \[2, 3\]"),
    ):
        save_file(tensors, tmp_path / "odd.safetensors")
        with pytest.raises(UserError, match=told):
            read_vectors(tmp_path / "odd.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="cut short"):
        read_vectors(tmp_path / "cut.safetensors")
    vectors = {"a": torch.ones(2)}
    for old, new, kind in ((["x"], ["a"], "an old"), (["a"], ["x"], "a new")):
        with pytest.raises(UserError, match=f"none belongs to {kind} piece"):
            find_neighbours(vectors, old, new)
