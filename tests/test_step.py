"""A step's folder: its key, what makes it outdated, what is noticed as damage, what is never thrown away."""

from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.run import write_json
from graftlm.step import Order, Step, changed_keys, fingerprint, make_order


def order(asked=None, given=None, before="", version=1) -> Order:
    return make_order("4-full", asked or {"stages": {"full": {"epochs": 1}}}, given or {}, before, version)


def test_what_changed_is_told_to_the_key_in_lists_by_name_or_number() -> None:
    before = {"seed": 1, "stages": [{"name": "a", "epochs": 1}, {"name": "b"}], "sources": [{"path": "x"}], "few": [1]}
    after = {"seed": 1, "stages": [{"name": "a", "epochs": 2}, {"name": "c"}], "sources": [{"path": "y"}], "few": [2]}
    assert changed_keys(before, after) == {"stages.a.epochs", "stages.b", "stages.c", "sources.0.path", "few"}
    assert changed_keys(before, before) == set()
    assert changed_keys({"stages": []}, before) == {"stages", "seed", "sources", "few"}


def test_fingerprint_follows_content_not_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b").write_text("y")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    whole = fingerprint(tmp_path)
    (tmp_path / "c").write_text("")
    assert fingerprint(tmp_path) != whole
    assert fingerprint("owner/name") == "hub:owner/name"


def test_every_file_a_pattern_names_is_in_its_fingerprint(tmp_path: Path) -> None:
    """A shard changed, added or renamed redoes the step; where the shards lie does not matter."""
    marks = []
    for name, text in (("a/part-1", "x"), ("a/deep/part-2", "y"), ("a/deep/part-2", "z"), ("a/other", "z")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        marks.append(fingerprint(tmp_path / "a" / "**" / "part-*"))
    assert len(set(marks[:3])) == 3
    assert marks[3] == marks[2]
    (tmp_path / "a").rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved" / "**" / "part-*") == marks[3]
    (tmp_path / "moved" / "part-1").rename(tmp_path / "moved" / "part-0")
    assert fingerprint(tmp_path / "moved" / "**" / "part-*") != marks[3]


def test_the_key_holds_what_is_asked_given_and_went_before_but_not_where_files_lie() -> None:
    plain = order()
    assert order().key == plain.key
    for other in (
        order({"stages": {"full": {"epochs": 2}}}),
        order(given={"a": "1"}),
        order(before="x"),
        order(version=2),
    ):
        assert other.key != plain.key
    here, there = (
        order({"data": {"sources": [{"path": path, "sample": 3}]}}, {path: "mark"}) for path in ("/a/zh", "/b/zh")
    )
    assert here.key == there.key
    assert order({"data": {"sources": [{"path": "/a/zh", "sample": 4}]}}, {"/a/zh": "mark"}).key != here.key


def test_a_step_is_done_for_its_key_and_tells_what_changed(tmp_path: Path) -> None:
    step, first = Step(tmp_path / "3-data"), order({"data": {"seed": 1, "sample": 2}}, {"/a": "1"})
    step.begin(first)
    assert not step.is_done(first.key)
    step.finish(first.key, 1.5, num_rows=3)
    assert step.is_done(first.key)
    assert step.seconds() == 1.5
    assert step.changes(first) == []
    second = order({"data": {"seed": 7, "sample": 2}}, {"/a": "2"})
    assert not step.is_done(second.key)
    assert step.changes(second) == ["data.seed", "the contents of /a"]


def test_only_interrupted_training_is_kept(tmp_path: Path) -> None:
    step, first, second = Step(tmp_path / "2-base"), order(), order(before="x")
    step.begin(first)
    (step.folder / ".half").write_text("x")
    step.begin(first)
    assert [p.name for p in step.folder.iterdir()] == ["started.json"]
    (step.folder / "checkpoints").mkdir()
    step.begin(first)
    assert (step.folder / "checkpoints").exists()
    step.finish(first.key, 1.0)
    step.begin(second)
    assert [p.name for p in step.folder.iterdir()] == ["started.json"]


def test_unfinished_training_asked_for_otherwise_is_refused(tmp_path: Path) -> None:
    """R7: the changed keys are listed and nothing is lost."""
    step = Step(tmp_path / "4-full")
    first, second = order({"stages": {"full": {"lr": 1, "n": 2}}}), order({"stages": {"full": {"lr": 3, "n": 2}}})
    step.begin(first)
    (step.folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"begun with other values of: stages\.full\.lr\.") as error:
        step.begin(second)
    assert f"delete {step.folder}" in error.value.fix
    step.begin(first)
    assert (step.folder / "checkpoints").is_dir()


def test_a_finished_step_gives_back_the_space_of_its_checkpoints(tmp_path: Path) -> None:
    step = Step(tmp_path / "4-full")
    step.begin(order())
    for name in ("checkpoints", "best", "trained"):
        (step.folder / name / "inner").mkdir(parents=True)
        (step.folder / name / "inner" / "w").write_text("x")
    step.finish(order().key, 1.0)
    assert sorted(p.name for p in step.folder.iterdir()) == ["done.json", "started.json", "trained"]
    assert step.is_done(order().key)


@pytest.mark.parametrize(
    ("damage", "told"), [(Path.unlink, "is missing"), (lambda p: p.write_text("xyz"), "3 bytes, not 1")]
)
def test_damage_of_a_finished_step_is_told(tmp_path: Path, damage, told: str) -> None:
    step = Step(tmp_path / "3-data")
    step.begin(order())
    file = step.folder / "train" / "ids.npy"
    file.parent.mkdir()
    file.write_text("x")
    step.finish(order().key, 1.0)
    damage(file)
    with pytest.raises(UserError, match=told) as error:
        step.is_done(order().key)
    assert "ids.npy" in error.value.problem
    assert f"delete {step.folder}" in error.value.fix


@pytest.mark.parametrize("name", ["done.json", "started.json"])
def test_a_damaged_mark_is_told(tmp_path: Path, name: str) -> None:
    step = Step(tmp_path / "3-data")
    step.begin(order())
    step.finish(order().key, 1.0)
    (step.folder / name).write_text('{"key": ')
    with pytest.raises(UserError, match="not JSON"):
        step.is_done(order().key) and step.begin(order())


def test_a_link_or_file_in_a_steps_place_is_not_touched(tmp_path: Path) -> None:
    """P1: what a link points to is never cleared."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("x")
    (tmp_path / "4-full").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "5-lora").write_text("x")
    for name in ("4-full", "5-lora"):
        with pytest.raises(UserError, match="a link or a file"):
            Step(tmp_path / name).begin(order())
    assert (tmp_path / "elsewhere" / "mine").exists()


def test_moved_below_each_keeps_a_name_of_its_own(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        (tmp_path / "6-model").mkdir()
        write_json(tmp_path / "6-model" / "done.json", {})
        names.append(Step(tmp_path / "6-model").move_below("earlier"))
    assert names == ["6-model", "6-model.1", "6-model.2"]
    assert sorted(p.name for p in (tmp_path / "earlier").iterdir()) == names
