"""Temporary files of atomic writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from etude.trainer.checkpoint import atomic
from etude.trainer.checkpoint.atomic import replacing
from etude.trainer.checkpoint.folder import remove_stale

DAY = 24 * 60 * 60


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leave(folder: Path, name: str, pid: int, monkeypatch: pytest.MonkeyPatch, machine: str | None = None) -> str:
    """A temporary file as a killed process would leave it; its name."""
    before = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: pid)
        patch.setattr(os, "replace", lambda source, target: None)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        if machine is not None:
            patch.setattr(atomic, "_machine", lambda: machine)
        with replacing(folder / name) as file:
            file.write(b"unfinished")
    (left,) = names(folder) - before
    return left


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_two_writers_of_one_name_use_different_temporary_files(tmp_path: Path) -> None:
    """As two hosts, or two containers, in which both processes have the same number."""
    path = tmp_path / "ep1-ba1.pt"
    with replacing(path) as one, replacing(path) as other:
        one.write(b"one")
        other.write(b"other")
        one.flush()
        other.flush()
        assert sorted(file.read_bytes() for file in tmp_path.iterdir()) == [b"one", b"other"]
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == {"ep1-ba1.pt"}


@pytest.mark.parametrize("name", ["ep1-ba1.pt", "latest", "best"])
def test_files_of_dead_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: int, name: str
) -> None:
    for pid in (dead, os.getpid()):
        leave(tmp_path, name, pid, monkeypatch)
    alive = leave(tmp_path, name, os.getppid(), monkeypatch)
    remove_stale(tmp_path)
    assert names(tmp_path) == {alive}


def test_files_of_another_machine_are_removed_only_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: int
) -> None:
    fresh = leave(tmp_path, "ep1-ba1.pt", dead, monkeypatch, machine="0123456789abcdef")
    old = leave(tmp_path, "ep1-ba1.pt", dead, monkeypatch, machine="0123456789abcdef")
    then = (tmp_path / old).stat().st_mtime - DAY - 1
    os.utime(tmp_path / old, (then, then))
    remove_stale(tmp_path)
    assert names(tmp_path) == {fresh}


def test_another_boot_or_process_namespace_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {atomic._machine()}
    assert atomic._machine() in found
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: "pid:[4026532999]")
        found.add(atomic._machine())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda path: "another boot")
        found.add(atomic._machine())
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", lambda path: os.stat("/missing"))  # not on Linux
        found.add(atomic._machine())
    assert len(found) == 4


def test_other_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: int) -> None:
    left = leave(tmp_path, "ep1-ba1.pt", dead, monkeypatch)
    others = {
        left.removeprefix("."),
        f"{left}2",
        left.replace(".ep1-ba1.pt.", ".notes."),
        f".ep1-ba1.pt.{dead}.tmp",
        ".hidden",
        "model.pt",
    }
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / left).rename(tmp_path / "kept")
    (tmp_path / left).mkdir()
    remove_stale(tmp_path)
    assert names(tmp_path) == {*others, "kept", left}


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "ep1-ba1.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"ep1-ba1.pt"}
