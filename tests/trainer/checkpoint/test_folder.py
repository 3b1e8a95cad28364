"""Checkpoint folders: names, order, `latest` and `best`, removal."""

import logging
from pathlib import Path
from typing import Any

import pytest

from etude.trainer.checkpoint.file import VERSION, CheckpointError, write_checkpoint
from etude.trainer.checkpoint.folder import (
    candidates,
    checkpoint_name,
    newest_good,
    read_pointer,
    remove_old,
    remove_stale,
    set_pointer,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ep1-ba5.pt"


class TestNames:
    def test_they_say_epoch_and_batch(self) -> None:
        assert checkpoint_name(3, 120) == "ep3-ba120.pt"
        assert checkpoint_name(0, 0) == "ep0-ba0.pt"

    @pytest.mark.parametrize("number", [-1, 1.0, True, "1", None])
    def test_only_ints_count(self, number: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="epoch must be an int >= 0, got"):
            checkpoint_name(number, 1)
        with pytest.raises((TypeError, ValueError), match="batch must be an int >= 0, got"):
            checkpoint_name(1, number)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        write_checkpoint(folder / name, {"version": VERSION, "name": name})


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


class TestPointer:
    @pytest.mark.parametrize("pointer", ["latest", "best"])
    def test_it_returns_the_value_set_last(self, tmp_path: Path, pointer: str) -> None:
        folder = tmp_path / "new"
        for name in ("ep10-ba100.pt", "ep1-ba5.pt"):
            set_pointer(folder, pointer, name)
            assert read_pointer(folder, pointer) == name
            assert (folder / pointer).read_text() == f"{name}\n"

    def test_a_missing_pointer_is_none(self, tmp_path: Path) -> None:
        assert read_pointer(tmp_path, "latest") is None
        assert read_pointer(tmp_path / "missing", "latest") is None

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\n",
            b"../ep1-ba5.pt",
            b"/tmp/ep1-ba5.pt",
            b"sub/ep1-ba5.pt",
            b"./ep1-ba5.pt",
            b"ep1-ba5.pt\n\n",
            b"ep1-ba5.pt\nep2-ba9.pt\n",
            b" ep1-ba5.pt",
            b"ep1-ba5.pt\0",
            b"ep-1-ba5.pt",
            b"ep1-ba05.pt",
            "ep\u0661-ba5.pt".encode(),
            b"\xff\xfe\x00",
            b"ep1-ba" + b"5" * 10**6 + b".pt",
            b"5" * 10**6,
        ],
        ids=lambda text: ascii(text[:20]),
    )
    def test_a_pointer_with_other_contents_is_ignored(self, tmp_path: Path, text: bytes) -> None:
        fill(tmp_path, "ep1-ba5.pt")
        (tmp_path / "latest").write_bytes(text)
        assert read_pointer(tmp_path, "latest") is None
        assert names(candidates(tmp_path)) == ["ep1-ba5.pt"]

    def test_a_folder_of_that_name_is_not_a_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "latest").mkdir()
        assert read_pointer(tmp_path, "latest") is None

    @pytest.mark.parametrize("name", ["", "../ep1-ba5.pt", "ep1-ba5.pt\n", "latest", "ep1-ba5"])
    def test_only_names_of_checkpoints_are_set(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="name must be the file name of a checkpoint"):
            set_pointer(tmp_path, "latest", name)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("pointer", ["", "newest", "../latest", "ep1-ba5.pt"])
    def test_only_two_pointers_are_known(self, tmp_path: Path, pointer: str) -> None:
        with pytest.raises(ValueError, match='pointer must be "latest" or "best", got'):
            set_pointer(tmp_path, pointer, "ep1-ba5.pt")
        with pytest.raises(ValueError, match='pointer must be "latest" or "best", got'):
            read_pointer(tmp_path, pointer)


class TestCandidates:
    def test_the_newest_comes_first_by_number(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep2-ba9.pt", "ep10-ba100.pt", "ep1-ba20.pt", "ep3-ba20.pt")
        assert names(candidates(tmp_path)) == ["ep10-ba100.pt", "ep3-ba20.pt", "ep1-ba20.pt", "ep2-ba9.pt"]

    def test_the_checkpoint_named_by_latest_comes_first(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt", "ep3-ba3.pt")
        set_pointer(tmp_path, "latest", "ep2-ba2.pt")
        set_pointer(tmp_path, "best", "ep1-ba1.pt")
        assert names(candidates(tmp_path)) == ["ep2-ba2.pt", "ep3-ba3.pt", "ep1-ba1.pt"]

    def test_a_missing_latest_changes_nothing(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt")
        set_pointer(tmp_path, "latest", "ep3-ba3.pt")
        assert names(candidates(tmp_path)) == ["ep2-ba2.pt", "ep1-ba1.pt"]

    def test_other_files_are_not_checkpoints(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt")
        for name in ("model.pt", ".ep1-ba2.pt.77.tmp", "ep1-ba2.pt.bak", "xep1-ba2.pt", "ep1-ba2.ptx", "ep01-ba2.pt"):
            (tmp_path / name).touch()
        (tmp_path / "ep9-ba9.pt").mkdir()
        assert names(candidates(tmp_path)) == ["ep1-ba1.pt"]

    def test_a_missing_folder_has_none(self, tmp_path: Path) -> None:
        assert candidates(tmp_path / "missing") == []


class TestNewestGood:
    def test_it_is_the_latest_and_nothing_is_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt")
        set_pointer(tmp_path, "latest", "ep2-ba2.pt")
        assert newest_good(tmp_path) == (tmp_path / "ep2-ba2.pt", {"version": VERSION, "name": "ep2-ba2.pt"})
        assert caplog.records == []

    def test_each_damaged_one_before_it_is_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt", "ep3-ba3.pt", "ep4-ba4.pt")
        set_pointer(tmp_path, "latest", "ep4-ba4.pt")
        corrupt(tmp_path / "ep4-ba4.pt")
        (tmp_path / "ep3-ba3.pt").write_bytes(b"")
        corrupt(tmp_path / "ep1-ba1.pt")
        found = newest_good(tmp_path)
        assert found is not None
        assert found[1]["name"] == "ep2-ba2.pt"
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
        first, second = (record.getMessage() for record in caplog.records)
        assert str(tmp_path / "ep4-ba4.pt") in first
        assert "cannot be loaded (it does not end with a checksum" in first
        assert first.endswith("): falling back to the one before")
        assert "ep3-ba3.pt cannot be loaded (it is empty): falling back to the one before" in second

    def test_a_missing_latest_is_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        fill(tmp_path, "ep1-ba1.pt")
        set_pointer(tmp_path, "latest", "ep2-ba2.pt")
        found = newest_good(tmp_path)
        assert found is not None
        assert found[0].name == "ep1-ba1.pt"
        (record,) = caplog.records
        assert "ep2-ba2.pt is missing" in record.getMessage()

    def test_without_checkpoints_there_is_none(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert newest_good(tmp_path) is None
        assert newest_good(tmp_path / "missing") is None
        assert caplog.records == []

    def test_without_an_intact_checkpoint_the_error_names_all(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt")
        corrupt(tmp_path / "ep1-ba1.pt")
        (tmp_path / "ep2-ba2.pt").write_bytes(b"")
        with pytest.raises(CheckpointError, match="none of its checkpoints can be loaded") as caught:
            newest_good(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "ep2-ba2.pt (it is empty), ep1-ba1.pt (it does not end" in str(caught.value)


class TestRemoval:
    def test_a_missing_folder_has_nothing_stale(self, tmp_path: Path) -> None:
        remove_stale(tmp_path / "missing")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("keep", [0, 1, 2, 9])
    def test_the_newest_and_the_protected_stay(self, tmp_path: Path, keep: int) -> None:
        newest_first = ["ep10-ba100.pt", "ep3-ba20.pt", "ep1-ba20.pt", "ep2-ba9.pt"]
        fill(tmp_path, *newest_first)
        others = {"model.pt", "best", ".ep1-ba1.pt.1.tmp"}
        for name in others:
            (tmp_path / name).touch()
        remove_old(tmp_path, keep, {"ep1-ba20.pt", "ep7-ba7.pt"})
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {*newest_first[:keep], "ep1-ba20.pt"} | others

    def test_damaged_ones_do_not_count_and_stay(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep1-ba2.pt", "ep1-ba3.pt", "ep1-ba4.pt", "ep1-ba5.pt")
        remove_old(tmp_path, 2, (), damaged={"ep1-ba5.pt", "ep1-ba4.pt"})
        assert names(candidates(tmp_path)) == ["ep1-ba5.pt", "ep1-ba4.pt", "ep1-ba3.pt", "ep1-ba2.pt"]

    @pytest.mark.parametrize("keep", [-1, 1.0, True])
    def test_how_many_is_an_int(self, tmp_path: Path, keep: Any) -> None:
        fill(tmp_path, "ep1-ba1.pt")
        with pytest.raises((TypeError, ValueError), match="keep must be an int >= 0, got"):
            remove_old(tmp_path, keep, ())
        assert names(candidates(tmp_path)) == ["ep1-ba1.pt"]
