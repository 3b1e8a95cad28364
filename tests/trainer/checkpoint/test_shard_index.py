"""Validation of the index of shards."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.trainer.checkpoint import atomic
from etude.trainer.checkpoint.folder import remove_stale
from etude.trainer.checkpoint.shard_index import check_index
from etude.trainer.checkpoint.shards import remove_shards

FILES = {"__0_0.distcp": 24, "__1_0.distcp": 24}
PARTS: list[Any] = [[[0, 0], [2, 3], "__0_0.distcp", 0, 24], [[2, 0], [2, 3], "__1_0.distcp", 0, 24]]


def index(parts: Any, size: Any = (4, 3), dtype: Any = torch.float32) -> dict[str, Any]:
    return {"weight": {"dtype": dtype, "size": list(size), "parts": parts}}


@pytest.mark.parametrize(
    "parts",
    [
        PARTS[:1],
        [PARTS[0], PARTS[0]],
        [PARTS[0], [[3, 0], [2, 3], "__1_0.distcp", 0, 24]],
        [PARTS[0], [[1, 0], [2, 3], "__1_0.distcp", 0, 24]],
        [PARTS[0], [[2, 0], [2, 3], "__1_0.distcp", 0, 8]],
        [*PARTS, [[0, 0], [4, 3], "__1_0.distcp", 0, 0]],
        [],
    ],
    ids=["missing", "twice", "outside", "overlapping", "too few bytes", "one more", "none"],
)
def test_parts_that_are_not_all_of_a_tensor_are_refused(parts: list[Any]) -> None:
    check_index(index(PARTS), FILES)
    with pytest.raises(ValueError, match="must hold each part of 'weight' once"):
        check_index(index(parts), FILES)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([PARTS[0], [[2, 0], [2, 3], "__2_0.distcp", 0, 24]], "must lie in a shard of the checkpoint"),
        ([PARTS[0], [[2, 0], [2, 3], "__1_0.distcp", 8, 24]], "must lie in a shard of the checkpoint"),
        ([[[0, 0], [2**30, 3], "__0_0.distcp", 0, 3 * 2**32]], "must lie in a shard of the checkpoint"),
        ([PARTS[0], [[2, 0], [2, 3.0], "__1_0.distcp", 0, 24]], "must hold dtype, size and parts"),
        ([[[-2, 0], [6, 3], "__1_0.distcp", 0, 24]], "must hold dtype, size and parts"),
        ([PARTS[0][:4]], "must hold dtype, size and parts"),
        (3, "must hold dtype, size and parts"),
    ],
)
def test_an_index_of_another_form_is_refused(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_index(index(parts), FILES)
    wrong: Any
    for wrong in (index(PARTS, dtype="float32"), index(PARTS, size=[1] * 10**5), {"weight": []}, []):
        with pytest.raises(ValueError, match="the index of the shards must"):
            check_index(wrong, FILES)


def test_tensors_cannot_share_the_bytes_of_a_file() -> None:
    many = {f"weight{number}": index(PARTS)["weight"] for number in range(100)}
    with pytest.raises(ValueError, match="must not be larger than the shards together"):
        check_index(many, FILES)


def test_a_hundred_thousand_parts_are_checked_one_by_one_and_not_in_pairs() -> None:
    columns = [[[0, column], [4, 1], "x", 16 * column, 16] for column in range(100_000)]
    check_index(index(columns, (4, 100_000)), {"x": 1_600_000})
    with pytest.raises(ValueError, match="must hold each part"):
        check_index(index([*columns[:-1], columns[0]], (4, 100_000)), {"x": 1_600_000})


CUTS = st.lists(st.integers(1, 5), max_size=3)


@given(cuts=st.lists(CUTS.map(lambda sizes: sizes or [1]), min_size=0, max_size=3), drop=st.integers(0, 30))
def test_the_grid_of_a_mesh_is_whole_and_without_any_part_it_is_not(cuts: list[list[int]], drop: int) -> None:
    boxes: list[tuple[list[int], list[int]]] = [([], [])]
    for sizes in cuts:
        begins = [sum(sizes[:number]) for number in range(len(sizes))]
        pieces = list(zip(begins, sizes, strict=True))
        boxes = [([*begin, b], [*shape, s]) for begin, shape in boxes for b, s in pieces]
    parts, offset = [], 0
    for begin, shape in boxes:
        length = 4 * int(torch.Size(shape).numel())
        parts.append([begin, shape, "x", offset, length])
        offset += length
    size = [sum(sizes) for sizes in cuts]
    check_index(index(parts, size), {"x": offset})
    parts.insert(0, [[0] * len(size), [0] * len(size), "x", 0, 0] if size else parts[0])  # a rank without rows
    if size:
        check_index(index(parts, size), {"x": offset})
    del parts[1 + drop % len(boxes) if size else 0 :]
    with pytest.raises(ValueError, match="must hold each part"):
        check_index(index(parts, size), {"x": offset})


def leave(folder: Path, name: str, pid: int, machine: str) -> Path:
    """Shards as a process writes them before the checkpoint itself."""
    shards = folder / f"{name}.{machine}.{pid}.01234567.shards"
    shards.mkdir()
    (shards / "__0_0.distcp").touch()
    return shards


def test_only_shards_that_nobody_writes_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    here, other, dead = atomic._machine(), "0123456789abcdef", process.pid
    (tmp_path / "ep0-ba3.pt").touch()
    (tmp_path / "final.ckpt").touch()
    kept = [
        leave(tmp_path, "ep0-ba3.pt", dead, here),
        leave(tmp_path, "final.ckpt", dead, here),
        leave(tmp_path, "ep0-ba9.pt", os.getppid(), here),
        leave(tmp_path, "ep0-ba9.pt", dead, other),
        tmp_path / "mine.shards",
    ]
    kept[-1].mkdir()
    removed = [leave(tmp_path, "ep0-ba9.pt", dead, here), leave(tmp_path, "ep0-ba8.pt", dead, other)]
    for path in (removed[1], removed[1] / "__0_0.distcp"):
        os.utime(path, (0, 0))
    remove_stale(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in removed)


def test_the_shards_of_a_checkpoint_are_removed_and_not_those_of_a_longer_name(tmp_path: Path) -> None:
    own, other = (leave(tmp_path, name, 1, "0123456789abcdef") for name in ("a.pt", "a.pt.b"))
    remove_shards(tmp_path / "a.pt")
    assert not own.exists()
    assert other.exists()
