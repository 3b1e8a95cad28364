"""Checkpoint files that would unpack to far more than their size; foreign files and other versions."""

import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.trainer.checkpoint.bounds import check_hashing
from etude.trainer.checkpoint.file import VERSION, CheckpointError, read_checkpoint, write_checkpoint
from helpers.checkpoint_files import repacked, sealed, torch_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ep1-ba5.pt"


def reason_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "\n" not in caught.value.reason
    return caught.value.reason


def laughing(kind: Any, depth: int = 30) -> Any:
    """Ten references to ten references to ... one value."""
    value: Any = "ha"
    for _ in range(depth):
        value = kind(value)
    return value


LAUGHING = {
    "lists": laughing(lambda value: [value] * 10),
    "tuples": laughing(lambda value: (value,) * 10),
    "dictionaries": laughing(lambda value: dict.fromkeys("abcdefghij", value)),
    "ordered dictionaries": laughing(lambda value: OrderedDict.fromkeys("abcdefghij", value)),
}


class TestExpansion:
    @pytest.mark.parametrize("value", LAUGHING.values(), ids=LAUGHING.keys())
    def test_references_to_references_are_refused(self, path: Path, value: Any) -> None:
        path.write_bytes(sealed(torch_bytes({"version": VERSION, "settings": value})))
        assert path.stat().st_size < 10_000
        assert "it refers to the same values too many times" in reason_of(path)

    def test_a_list_in_itself_is_refused(self, path: Path) -> None:
        endless: list[Any] = []
        endless.append(endless)
        path.write_bytes(sealed(torch_bytes({"version": VERSION, "settings": endless})))
        assert "levels deep" in reason_of(path) or "too many places" in reason_of(path)

    def test_deep_nesting_is_refused(self, path: Path) -> None:
        archive = torch_bytes({"version": VERSION, "settings": None})
        nest = b"]" * 100_000 + b"a" * 99_999  # EMPTY_LIST, APPEND
        pickled = b"\x80\x02}(X\x07\0\0\0versionK" + bytes([VERSION]) + b"X\x08\0\0\0settings" + nest + b"u."
        path.write_bytes(sealed(repacked(archive, data_pkl=pickled)))
        assert "levels deep" in reason_of(path)

    def test_a_tensor_of_a_few_bytes_that_repeats_is_refused(self, path: Path) -> None:
        huge = torch.zeros(1).expand(2**20, 2**20)
        path.write_bytes(sealed(torch_bytes({"version": VERSION, "state": huge})))
        assert "tensors that are larger than the file" in reason_of(path)

    def test_metrics_that_could_not_be_read_are_not_written(self, path: Path) -> None:
        shared = [list(range(2000))] * 200
        with pytest.raises(ValueError, match="it refers to the same values too many times"):
            write_checkpoint(path, {"version": VERSION, "state": shared})
        assert list(path.parent.iterdir()) == []

    def test_ordinary_shared_and_expanded_tensors_are_allowed(self, path: Path) -> None:
        betas, mask = (0.9, 0.999), torch.ones(1).expand(1000, 1000)
        contents = {"version": VERSION, "groups": [{"betas": betas} for _ in range(500)], "masks": [mask, mask]}
        write_checkpoint(path, contents)
        assert read_checkpoint(path)["groups"] == contents["groups"]


def keyed(depth: int) -> bytes:
    """A pickle of a dictionary whose key is a tuple of two references to a tuple of two references to ..."""
    doubled = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) + b"0" for n in range(depth))
    return b"\x80\x02K\x01q\x000" + doubled + b"}h" + bytes([depth]) + b"K\x01s."


class TestHashing:
    def test_a_key_that_takes_forever_to_hash_is_refused_before_it_is_loaded(self, path: Path) -> None:
        assert pickle.loads(keyed(2)) == {((1, 1), (1, 1)): 1}
        check_hashing(keyed(2))
        archive = torch_bytes({"version": VERSION})
        path.write_bytes(sealed(repacked(archive, data_pkl=keyed(100))))
        assert "too long to hash" in reason_of(path)

    def test_members_of_a_set_are_looked_at_too(self) -> None:
        depth = 100
        made = b"c__builtin__\nset\n" + b"]h" + bytes([depth]) + b"a\x85R."
        with pytest.raises(ValueError, match="too long to hash"):
            check_hashing(keyed(depth)[:-1] + b"0" + made)

    @pytest.mark.parametrize("protocol", range(2, 5))
    def test_ordinary_pickles_pass(self, protocol: int) -> None:
        value = {"a": [1, 2.0, (3, None)], 5: {"b": {1, (2, 3)}}, "c": [("x", "y")] * 9, "d": OrderedDict(e=b"f")}
        check_hashing(pickle.dumps(value, protocol))


class TestForeignFiles:
    def test_a_file_of_torch_is_recognized_and_the_error_says_how_to_load_it(self, path: Path) -> None:
        torch.save({"weight": torch.ones(2)}, path)
        reason = reason_of(path)
        assert "written by torch.save and not by etude" in reason
        assert "torch.load(path, weights_only=True)" in reason

    def test_a_file_of_old_torch_is_recognized(self, path: Path) -> None:
        torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
        assert "a pickle and not a checkpoint of etude" in reason_of(path)

    def test_a_safetensors_file_is_recognized(self, path: Path) -> None:
        header = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
        assert "a safetensors file and not a checkpoint of etude" in reason_of(path)

    def test_anything_else_is_not_guessed(self, path: Path) -> None:
        path.write_bytes(b"hello " * 100)
        assert "it is truncated, or not a checkpoint of etude" in reason_of(path)

    @pytest.mark.parametrize("version", [0, VERSION + 1, -1, 10**6])
    def test_another_version_is_refused_by_its_number(self, path: Path, version: int) -> None:
        path.write_bytes(sealed(torch_bytes({"version": version})))
        expected = f"it is version {version} of the format, this release of etude reads version {VERSION}"
        assert reason_of(path) == expected
