"""Damaged checkpoint files."""

import errno
import io
import os
import pickle
import random
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.trainer.checkpoint.file import VERSION, CheckpointError, read_checkpoint, write_checkpoint
from helpers.checkpoint_files import OLD, fails, repacked, same, sealed, torch_bytes


def error_of(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ep1-ba5.pt"


class TestDamage:
    @pytest.fixture
    def intact(self, path: Path) -> bytes:
        write_checkpoint(path, OLD)
        return path.read_bytes()

    def test_a_missing_file(self, path: Path) -> None:
        assert error_of(path).reason == "there is no such file"

    def test_a_folder(self, path: Path) -> None:
        path.mkdir()
        assert error_of(path).reason == "there is no such file"

    def test_an_empty_file(self, path: Path) -> None:
        path.touch()
        assert error_of(path).reason == "it is empty"

    def test_a_file_that_may_not_be_read(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_checkpoint(path, OLD)
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", fails(PermissionError(errno.EACCES, "Permission denied")))
            assert error_of(path).reason == "it cannot be read (PermissionError)"

    def test_a_file_cut_anywhere(self, path: Path, intact: bytes) -> None:
        lengths = [*range(1, len(intact), 13), len(intact) // 2, len(intact) * 99 // 100, len(intact) - 1]
        for length in lengths:
            path.write_bytes(intact[:length])
            assert "truncated" in error_of(path).reason

    def test_any_byte_flipped(self, path: Path, intact: bytes) -> None:
        assert len(intact) > 1000
        for position in range(len(intact)):
            damaged = bytearray(intact)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            assert "checksum" in error_of(path).reason

    def test_every_bit_of_the_directory_and_what_follows(self, path: Path, intact: bytes) -> None:
        """Here an archive has flags that change what torch makes of a record, and no checksum of its own."""
        start = intact.index(b"PK\x01\x02")
        for bit in range(8 * start, 8 * len(intact), 3):
            damaged = bytearray(intact)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert "checksum" in error_of(path).reason

    def test_bytes_that_were_added_taken_out_or_exchanged(self, path: Path, intact: bytes) -> None:
        middle = len(intact) // 2
        for damaged in (
            intact + b"\0",
            intact + intact,
            b"\0" + intact,
            intact[:middle] + intact[middle + 1 :],
            intact[:middle] + bytes(64) + intact[middle + 64 :],
            intact[:-64] + b"0" * 64,
            bytes(len(intact)),
        ):
            path.write_bytes(damaged)
            assert "checksum" in error_of(path).reason

    @pytest.mark.parametrize("size", [1, 4, 22, 71, 72, 1000])
    def test_garbage(self, path: Path, size: int) -> None:
        noise = random.Random(size).randbytes(size)
        for garbage in (noise, b"PK\x03\x04" + noise, sealed(noise + b"\0\0"), b"sha256:" + noise):
            path.write_bytes(garbage)
            error_of(path)

    def test_a_file_of_torch_without_a_checksum(self, path: Path) -> None:
        torch.save(OLD, path)
        assert "does not end with a checksum" in error_of(path).reason

    @pytest.mark.parametrize(
        ("contents", "reason"),
        [
            ([1], "got a list"),
            (torch.ones(1), "got a torch.Tensor"),
            ({}, "got a version that is a NoneType"),
            ({"version": True}, "got a version that is a bool"),
            ({"version": "x\ny" * 1000}, "got a version that is a str"),
            ({"version": torch.ones(2)}, "got a version that is a torch.Tensor"),
        ],
    )
    def test_contents_that_are_no_checkpoint(self, path: Path, contents: Any, reason: str) -> None:
        path.write_bytes(sealed(torch_bytes(contents)))
        assert error_of(path).reason == f'it must hold a dict with "version" {VERSION}, {reason}'

    def test_compressed_records(self, path: Path) -> None:
        path.write_bytes(sealed(repacked(torch_bytes(OLD))))
        assert same(read_checkpoint(path), OLD)
        path.write_bytes(sealed(repacked(torch_bytes(OLD), zipfile.ZIP_DEFLATED)))
        assert "not an archive of uncompressed records" in error_of(path).reason

    def test_records_that_overlap(self, path: Path) -> None:
        """Ten entries of the directory for the same megabyte."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data/0", bytes(10**6))
            archive.filelist *= 10
        path.write_bytes(sealed(buffer.getvalue()))
        assert "not an archive of uncompressed records" in error_of(path).reason

    def test_an_archive_without_records_of_torch(self, path: Path) -> None:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("hello.txt", "hello")
        path.write_bytes(sealed(buffer.getvalue()))
        assert "plain values and tensors" in error_of(path).reason

    def test_a_link_inside_the_folder_is_fine_and_one_that_leaves_it_is_not(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        write_checkpoint(folder / "ep1-ba5.pt", OLD)
        write_checkpoint(tmp_path / "outside.pt", OLD)
        (folder / "inside.pt").symlink_to("ep1-ba5.pt")
        (folder / "out.pt").symlink_to(tmp_path / "outside.pt")
        (folder / "relative.pt").symlink_to("../outside.pt")
        (folder / "loop.pt").symlink_to("loop.pt")
        (tmp_path / "link").symlink_to("folder")
        assert same(read_checkpoint(folder / "inside.pt"), OLD)
        assert same(read_checkpoint(tmp_path / "link" / "ep1-ba5.pt"), OLD)
        for name in ("out.pt", "relative.pt"):
            assert error_of(folder / name).reason == "it is a link to a file outside its folder"
        assert error_of(folder / "loop.pt").reason == "there is no such file"


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class StoragePickler(pickle.Pickler):
    """Gives every complex number the identity of a tensor's storage that holds a payload."""

    def __init__(self, file: Any, payload: Call) -> None:
        super().__init__(file, protocol=2)
        self.payload = payload

    def persistent_id(self, value: Any) -> Any:
        return ("storage", self.payload, "0", "cpu", 4) if isinstance(value, complex) else None


def in_a_storage(payload: Call) -> bytes:
    buffer = io.BytesIO()
    StoragePickler(buffer, payload).dump({"version": VERSION, "x": 1j})
    return buffer.getvalue()


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles that make `marker` when they are loaded without care."""
    command = f"touch {marker}"
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    touch = Call(os.system, command)
    return {
        "posix.system": pickle.dumps({"version": VERSION, "x": touch}, protocol=2),
        "os.system": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "protocol 0": f"cposix\nsystem\n(S'{command}'\ntR.".encode(),
        "protocol 4": pickle.dumps({"version": VERSION, "x": touch}, protocol=4),
        "eval": pickle.dumps(Call(eval, f"__import__('os').system('{command}')"), protocol=2),
        "exec": pickle.dumps(Call(exec, f"import os; os.mkdir('{marker}')"), protocol=2),
        "subprocess": pickle.dumps(Call(subprocess.call, ["touch", str(marker)]), protocol=2),
        "storage": in_a_storage(touch),
    }


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it_ran"


@pytest.mark.parametrize("name", payloads(Path("x")))
class TestCodeInAFile:
    def test_in_the_archive_it_does_not_run(self, path: Path, marker: Path, name: str) -> None:
        archive = repacked(torch_bytes(OLD), data_pkl=payloads(marker)[name])
        for file in (archive, sealed(archive)):
            path.write_bytes(file)
            error_of(path)
            assert not marker.exists()
        run_without_care(path, marker)

    def test_a_switch_of_torch_does_not_weaken_it(
        self, path: Path, marker: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        path.write_bytes(sealed(repacked(torch_bytes(OLD), data_pkl=payloads(marker)[name])))
        assert "plain values and tensors" in error_of(path).reason
        assert not marker.exists()

    def test_in_an_old_kind_of_file_it_does_not_run(self, path: Path, marker: Path, name: str) -> None:
        payload = payloads(marker)[name]
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for member in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(member)
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))
        legacy = torch_bytes(OLD, _use_new_zipfile_serialization=False)
        for start in (payload, legacy, legacy[:100] + payload, tar.getvalue()):
            for file in (start, sealed(start + b"\0\0"), sealed(start + torch_bytes(OLD))):
                path.write_bytes(file)
                error_of(path)
                assert not marker.exists()


def run_without_care(path: Path, marker: Path) -> None:
    """Shows that the payload is one."""
    with suppress(Exception):  # what the payload gives is no checkpoint
        torch.load(path, weights_only=False)
    assert marker.exists()
