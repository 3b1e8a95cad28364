import enum
import errno
import hashlib
import io
import logging
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR
from torch.utils.serialization import config

from etude.trainer.checkpoint.file import CheckpointError, read_checkpoint, write_checkpoint
from etude.trainer.checkpoint.folder import (
    candidates,
    checkpoint_name,
    newest_good,
    read_pointer,
    remove_old,
    remove_stale,
    set_pointer,
)

OLD = {"version": 1, "old": torch.arange(5.0)}
NEW = {"version": 1, "new": torch.arange(3000.0)}


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit: types, numbers, layout and attributes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        form = [(t.dtype, t.shape, t.stride(), t.requires_grad) for t in (a, b)]
        bits = [t.detach().contiguous().flatten().view(torch.uint8).tolist() if t.numel() else [] for t in (a, b)]
        return form[0] == form[1] and bits[0] == bits[1] and same(vars(a), vars(b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and all(same(a[key], b[key]) for key in a) and same_attributes(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def same_attributes(a: Any, b: Any) -> bool:
    return not isinstance(a, OrderedDict) or same(vars(a), vars(b))


def round_trip(path: Path, value: Any) -> Any:
    write_checkpoint(path, {"version": 1, "value": value})
    return read_checkpoint(path)["value"]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(3))


def trained(make_optimizer: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    model(torch.randn(4, 1, 5, 5))
    optimizer = make_optimizer(model.parameters())
    for _ in range(2):
        model(torch.randn(4, 1, 5, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def sealed(archive: bytes) -> bytes:
    """An archive without a comment, with the checksum as its comment."""
    body = archive[:-2] + struct.pack("<H", 71)
    return body + b"sha256:" + hashlib.sha256(body).hexdigest().encode()


def torch_bytes(contents: Any, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, **settings)
    return buffer.getvalue()


def repacked(archive: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """The archive with some records replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w", compression) as target:
        for name in source.namelist():
            replaced = records.get(name.split("/")[-1].replace(".", "_"))
            target.writestr(name, source.read(name) if replaced is None else replaced)
    return buffer.getvalue()


def error_of(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ep1-ba5.pt"


class TestRoundTrip:
    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            3,
            -(2**64),
            2**2039 - 1,
            -(2**2039),
            0.1,
            -0.0,
            float("nan"),
            float("-inf"),
            1j,
            "",
            "ä\n\x00",
            "\ud800",
            torch.float8_e4m3fn,
            torch.Size([2, 3]),
            torch.device("cuda", 1),
            set(),
            {1, "a", (2, None)},
            {1: "a", False: "b", 0.5: "c", "d": {}},
            [[], (), ((1,), [2, [3]])],
            random.Random(0).getstate(),
            torch.get_rng_state(),
        ],
    )
    def test_plain_values_come_back_as_they_were(self, path: Path, value: Any) -> None:
        assert same(round_trip(path, value), value)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.randn(3, 2).to(torch.bfloat16),
            torch.randn(3).half(),
            torch.randn(3).to(torch.float8_e4m3fn),
            torch.tensor(7),
            torch.tensor([float("nan"), -0.0, float("inf")]),
            torch.tensor([2**63 - 1, -(2**63)]),
            torch.tensor([True, False]),
            torch.tensor([1 + 2j]),
            torch.empty(0),
            torch.empty(2, 0, 3, dtype=torch.int16),
            torch.randn(4, 6).t(),
            torch.randn(4, 6)[::2, 1::3],
            torch.randn(1, 3).expand(4, 3),
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            torch.randn(2, requires_grad=True),
            nn.Parameter(torch.randn(2)),
            nn.Parameter(torch.randn(2), requires_grad=False),
            nn.Buffer(torch.ones(2)),
        ],
        ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}-{tensor.stride()}",
    )
    def test_tensors_come_back_bit_for_bit(self, path: Path, tensor: Tensor) -> None:
        assert same(round_trip(path, tensor), tensor)

    def test_sparse_tensors_come_back(self, path: Path) -> None:
        assert torch.equal(round_trip(path, torch.eye(3).to_sparse()).to_dense(), torch.eye(3))

    def test_attributes_of_tensors_come_back(self, path: Path) -> None:
        for tensor in (torch.ones(2), nn.Parameter(torch.ones(2))):
            tensor.tag = {"group": (1, "a")}  # type: ignore[attr-defined]
            assert same(round_trip(path, tensor), tensor)

    def test_tensors_that_share_memory_still_do(self, path: Path) -> None:
        whole = torch.arange(10.0)
        loaded, part = round_trip(path, [whole, whole[3:5]])
        part.zero_()
        assert loaded.tolist() == [0, 1, 2, 0, 0, 5, 6, 7, 8, 9]

    @pytest.mark.parametrize("make", [AdamW, lambda p: AdamW(p, amsgrad=True), lambda p: SGD(p, 0.1, momentum=0.9)])
    def test_the_state_of_a_training_comes_back_and_goes_on_the_same(self, path: Path, make: Any) -> None:
        model, optimizer = trained(make)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        assert state["optimizer"]["state"]
        loaded = round_trip(path, state)
        assert same(loaded, state)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])

    @pytest.mark.parametrize(
        "make",
        [
            lambda o: OneCycleLR(o, 0.1, total_steps=20),
            lambda o: OneCycleLR(o, 0.1, total_steps=20, anneal_strategy="linear", three_phase=True),
            lambda o: SequentialLR(o, [LinearLR(o), CosineAnnealingLR(o, 9)], milestones=[1]),
            lambda o: LambdaLR(o, lambda batch: 1 / (1 + batch)),
        ],
        ids=["one-cycle", "one-cycle-linear", "sequential", "lambda"],
    )
    def test_schedulers_come_back(self, path: Path, make: Any) -> None:
        optimizer = SGD([nn.Parameter(torch.ones(1))], 0.1, momentum=0.9)
        scheduler = make(optimizer)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        state = scheduler.state_dict()
        assert same(round_trip(path, state), state)

    def test_a_gradient_scaler_comes_back(self, path: Path) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
        scaler.scale(torch.ones(1))
        state = scaler.state_dict()
        assert state["scale"] == 2.0**11
        assert same(round_trip(path, state), state)

    def test_any_program_with_torch_or_a_zip_tool_can_read_the_file(self, path: Path) -> None:
        write_checkpoint(path, OLD)
        assert same(torch.load(path, weights_only=True), OLD)
        assert same(torch.load(path, weights_only=True, mmap=True), OLD)
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert path.read_bytes() == sealed(path.read_bytes()[: -len(archive.comment) - 2] + b"\0\0")

    def test_folders_are_made_and_nothing_else_lies_there(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "ep0-ba1.pt"
        write_checkpoint(path, OLD)
        assert list(path.parent.iterdir()) == [path]

    def test_settings_of_torch_make_no_difference(self, path: Path) -> None:
        write_checkpoint(path, OLD)
        with config.patch("load.mmap", True), torch.device("meta"):
            assert same(read_checkpoint(path), OLD)

    def test_tensors_of_a_device_that_is_not_there_come_to_the_cpu(self, path: Path) -> None:
        archive = torch_bytes(OLD)
        with zipfile.ZipFile(io.BytesIO(archive)) as records:
            pickled = records.read("archive/data.pkl")
        elsewhere = pickled.replace(b"\x03\0\0\0cpu", b"\x07\0\0\0cuda:99")
        assert elsewhere != pickled
        path.write_bytes(sealed(repacked(archive, data_pkl=elsewhere)))
        assert same(read_checkpoint(path), OLD)


class Colour(enum.Enum):
    RED = 1


class Subclass(Tensor):
    pass


Pair = namedtuple("Pair", "a b")


def with_attribute(holder: Any) -> Any:
    holder.tag = Path("a")
    return holder


class TestRefusalToWrite:
    @pytest.mark.parametrize(
        ("value", "name"),
        [
            (np.float64(1), "numpy.float64"),
            (np.ones(2), "numpy.ndarray"),
            (np.int64(1), "numpy.int64"),
            (Path("a"), "PosixPath"),
            (timedelta(1), "datetime.timedelta"),
            (Colour.RED, "Colour"),
            (object(), "a object"),
            (len, "a builtin_function_or_method"),
            (int, "a type"),
            (frozenset(), "a frozenset"),
            (b"", "a bytes"),
            (bytearray(), "a bytearray"),
            (Pair(1, 2), "Pair"),
            (defaultdict(int), "collections.defaultdict"),
            (torch.ones(2).as_subclass(Subclass), "Subclass"),
            (torch.Generator(), "torch._C.Generator"),
            (2**2039, "too long an int"),
            (-(2**2039) - 1, "too long an int"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_does_not_load_safely_is_refused_by_its_place(self, path: Path, value: Any, name: str) -> None:
        write_checkpoint(path, OLD)
        contents = {"version": 1, "callbacks": [{"state": OrderedDict(x=value)}]}
        with pytest.raises(TypeError, match=r"^callbacks\.0\.state\.x must be plain values and tensors") as caught:
            write_checkpoint(path, contents)
        assert str(caught.value).endswith(name)
        assert same(read_checkpoint(path), OLD)
        assert list(path.parent.iterdir()) == [path]

    def test_nested_tensors_are_refused(self, path: Path) -> None:
        with pytest.warns(UserWarning, match="nested"):
            nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
        with pytest.raises(TypeError, match=r"^x must be plain values and tensors"):
            write_checkpoint(path, {"version": 1, "x": nested})

    @pytest.mark.parametrize(
        "holder", [torch.ones(1), nn.Parameter(torch.ones(1)), OrderedDict(a=1)], ids=["tensor", "parameter", "dict"]
    )
    def test_attributes_are_looked_at_too(self, path: Path, holder: Any) -> None:
        with pytest.raises(TypeError, match=r"^model\.tag must be plain"):
            write_checkpoint(path, {"version": 1, "model": with_attribute(holder)})

    def test_keys_are_looked_at_too(self, path: Path) -> None:
        with pytest.raises(TypeError, match=r"^the key of a must be plain .* too long an int"):
            write_checkpoint(path, {"version": 1, "a": {2**2039: 1}})

    @pytest.mark.parametrize("key", [None, (1, 2), np.float64(1), Colour.RED])
    def test_keys_are_strings_or_numbers(self, path: Path, key: Any) -> None:
        with pytest.raises(TypeError, match=r"^the keys of a\.1 must be strings or numbers"):
            write_checkpoint(path, {"version": 1, "a": [0, {key: 1}]})

    def test_members_of_sets_are_looked_at_too(self, path: Path) -> None:
        with pytest.raises(TypeError, match=r"^what is in a must be plain"):
            write_checkpoint(path, {"version": 1, "a": {1, Path("a")}})

    @pytest.mark.parametrize(
        "contents", [{}, {"version": 2}, {"version": True}, {"version": 1.0}, {"version": "1"}, [("version", 1)], None]
    )
    def test_contents_of_another_version_are_refused(self, path: Path, contents: Any) -> None:
        with pytest.raises(ValueError, match=r'^contents must be a dict with "version" 1, got a|got version 2$'):
            write_checkpoint(path, contents)
        assert not path.exists()


class Interrupted:
    """A file whose n-th write fails."""

    def __init__(self, file: Any, count: int, error: BaseException) -> None:
        self.file, self.count, self.error = file, count, error

    def write(self, data: Any) -> int:
        self.count -= 1
        if self.count < 0:
            raise self.error
        return self.file.write(data)


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **settings: Any) -> None:
        raise error

    return fail


ERRORS = [OSError(errno.ENOSPC, "No space left"), OSError(errno.EDQUOT, "Quota exceeded"), KeyboardInterrupt()]


class TestAtomicity:
    @pytest.fixture(autouse=True)
    def old(self, path: Path) -> Iterator[None]:
        """Whatever a test does to the writing, the old file stays and nothing else does."""
        write_checkpoint(path, OLD)
        before = path.read_bytes()
        yield
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("error", ERRORS, ids=repr)
    @pytest.mark.parametrize("function", ["torch.save", "os.fsync", "os.replace"])
    def test_a_failure_at_any_step_is_passed_on(
        self, monkeypatch: pytest.MonkeyPatch, path: Path, function: str, error: BaseException
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(function, fails(error))
            with pytest.raises(type(error)) as caught:
                write_checkpoint(path, NEW)
        assert caught.value is error

    @pytest.mark.parametrize("error", ERRORS, ids=repr)
    @pytest.mark.parametrize("count", [0, 1, 2, 5, 10])
    def test_a_failure_in_the_middle_of_the_archive_is_passed_on(
        self, monkeypatch: pytest.MonkeyPatch, path: Path, count: int, error: BaseException
    ) -> None:
        save = torch.save
        with monkeypatch.context() as patch:
            patch.setattr("torch.save", lambda contents, file: save(contents, Interrupted(file, count, error)))
            with pytest.raises(type(error)) as caught:
                write_checkpoint(path, NEW)
        assert caught.value is error

    @pytest.mark.parametrize("limit", [1, 700, 5000, 12_000, len(torch_bytes(NEW)) + 20])
    def test_a_disk_that_takes_no_more_is_an_oserror(self, path: Path, limit: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_checkpoint(path, NEW)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_an_error_of_torch_is_not_taken_for_the_one_that_is_being_handled(self, path: Path) -> None:
        number = torch.ones(2)
        try:
            raise ValueError("loss is not a number")
        except ValueError:
            with pytest.raises(RuntimeError, match="view the same data as different types"):
                write_checkpoint(path, {"version": 1, "a": number, "b": number.view(torch.int32)})

    def test_a_folder_in_the_place_of_the_file_stays(self, tmp_path: Path) -> None:
        folder = tmp_path / "ep2-ba9.pt"
        folder.mkdir()
        with pytest.raises(IsADirectoryError):
            write_checkpoint(folder, NEW)
        folder.rmdir()

    @pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
    def test_a_pointer_is_written_atomically_too(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, function: str
    ) -> None:
        set_pointer(tmp_path, "latest", "ep1-ba5.pt")
        with monkeypatch.context() as patch:
            patch.setattr(function, fails(ERRORS[0]))
            with pytest.raises(OSError, match="No space left"):
                set_pointer(tmp_path, "latest", "ep2-ba9.pt")
        assert read_pointer(tmp_path, "latest") == "ep1-ba5.pt"
        (tmp_path / "latest").unlink()


def test_the_rest_of_an_earlier_process_of_the_same_number_is_in_nobodys_way(path: Path) -> None:
    (path.parent / f".{path.name}.{os.getpid()}.tmp").write_bytes(b"rest")
    write_checkpoint(path, NEW)
    assert same(read_checkpoint(path), NEW)
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_name_before_the_end(
    monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    calls: list[tuple[str, bool, int]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        is_folder = os.fstat(descriptor).st_ino == path.parent.stat().st_ino
        calls.append(("fsync", is_folder, os.fstat(descriptor).st_size))

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        calls.append(("replace", Path(source).parent == path.parent, 0))

    for write, target in [
        (lambda: write_checkpoint(path, NEW), path),
        (lambda: set_pointer(path.parent, "best", path.name), path.parent / "best"),
    ]:
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", recorded_fsync)
            patch.setattr(os, "replace", recorded_replace)
            write()
        size = target.stat().st_size
        assert [call[:2] for call in calls] == [("fsync", False), ("replace", True), ("fsync", True)]
        assert calls[0][2] == size, "all of the file must be written when it is synchronised"


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from etude.trainer.checkpoint.file import write_checkpoint

real = {"save": torch.save, "fsync": os.fsync, "replace": os.replace}

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

class Dying:
    def __init__(self, file, count):
        self.file, self.count = file, count

    def write(self, data):
        self.count -= 1
        if self.count < 0:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()
        return self.file.write(data)

def replace_and_die(source, target):
    real["replace"](source, target)
    die()

for folder, point in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if child == 0:
        if point == "fsync":
            os.fsync = die
        elif point == "replace":
            os.replace = die
        elif point == "replaced":
            os.replace = replace_and_die
        else:
            torch.save = lambda contents, file: real["save"](contents, Dying(file, int(point)))
        write_checkpoint(Path(folder) / "ep1-ba5.pt", {"version": 1, "new": torch.arange(3000.0)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_a_killed_process_leaves_the_old_file_or_the_new_one_and_its_rest_can_be_removed(tmp_path: Path) -> None:
    points = ["0", "1", "4", "8", "fsync", "replace", "replaced"]
    for point in points:
        write_checkpoint(tmp_path / point / "ep1-ba5.pt", OLD)
    arguments = [argument for point in points for argument in (str(tmp_path / point), point)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *arguments], check=True)
    for point in points:
        folder = tmp_path / point
        path = folder / "ep1-ba5.pt"
        assert same(read_checkpoint(path), NEW if point == "replaced" else OLD)
        assert len(list(folder.glob(".*.tmp"))) == (point != "replaced")
        assert candidates(folder) == [path]
        remove_stale(folder)
        assert list(folder.iterdir()) == [path]
        write_checkpoint(path, NEW)
        assert same(read_checkpoint(path), NEW)


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
            assert "cut" in error_of(path).reason

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
            ({"version": 2}, "got version 2"),
            ({"version": True}, "got a version that is a bool"),
            ({"version": "x\ny" * 1000}, "got a version that is a str"),
            ({"version": torch.ones(2)}, "got a version that is a torch.Tensor"),
        ],
    )
    def test_contents_that_are_no_checkpoint(self, path: Path, contents: Any, reason: str) -> None:
        path.write_bytes(sealed(torch_bytes(contents)))
        assert error_of(path).reason == f'it must hold a dict with "version" 1, {reason}'

    def test_compressed_records(self, path: Path) -> None:
        path.write_bytes(sealed(repacked(torch_bytes(OLD))))
        assert same(read_checkpoint(path), OLD)
        path.write_bytes(sealed(repacked(torch_bytes(OLD), zipfile.ZIP_DEFLATED)))
        assert "no archive of uncompressed records" in error_of(path).reason

    def test_records_that_overlap(self, path: Path) -> None:
        """Ten entries of the directory for the same megabyte."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data/0", bytes(10**6))
            archive.filelist *= 10
        path.write_bytes(sealed(buffer.getvalue()))
        assert "no archive of uncompressed records" in error_of(path).reason

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
            assert error_of(folder / name).reason == "it is a link that leaves its folder"
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
    StoragePickler(buffer, payload).dump({"version": 1, "x": 1j})
    return buffer.getvalue()


def payloads(marker: Path) -> dict[str, bytes]:
    """Pickles that make `marker` when they are loaded without care."""
    command = f"touch {marker}"
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    touch = Call(os.system, command)
    return {
        "posix.system": pickle.dumps({"version": 1, "x": touch}, protocol=2),
        "os.system": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "protocol 0": f"cposix\nsystem\n(S'{command}'\ntR.".encode(),
        "protocol 4": pickle.dumps({"version": 1, "x": touch}, protocol=4),
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


class TestNames:
    def test_they_say_epoch_and_batch(self) -> None:
        assert checkpoint_name(3, 120) == "ep3-ba120.pt"
        assert checkpoint_name(0, 0) == "ep0-ba0.pt"

    @pytest.mark.parametrize("number", [-1, 1.0, True, "1", None])
    def test_only_whole_numbers_count(self, number: Any) -> None:
        with pytest.raises(ValueError, match="epoch must be a whole number of at least 0, got"):
            checkpoint_name(number, 1)
        with pytest.raises(ValueError, match="batch must be a whole number of at least 0, got"):
            checkpoint_name(1, number)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        write_checkpoint(folder / name, {"version": 1, "name": name})


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


class TestPointer:
    @pytest.mark.parametrize("pointer", ["latest", "best"])
    def test_it_gives_back_what_was_set_last(self, tmp_path: Path, pointer: str) -> None:
        folder = tmp_path / "new"
        for name in ("ep10-ba100.pt", "ep1-ba5.pt"):
            set_pointer(folder, pointer, name)
            assert read_pointer(folder, pointer) == name
            assert (folder / pointer).read_text() == f"{name}\n"

    def test_a_missing_one_is_none(self, tmp_path: Path) -> None:
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
    def test_anything_but_a_name_is_none(self, tmp_path: Path, text: bytes) -> None:
        fill(tmp_path, "ep1-ba5.pt")
        (tmp_path / "latest").write_bytes(text)
        assert read_pointer(tmp_path, "latest") is None
        assert names(candidates(tmp_path)) == ["ep1-ba5.pt"]

    def test_a_folder_in_its_place_is_none(self, tmp_path: Path) -> None:
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

    def test_what_latest_names_comes_before(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt", "ep3-ba3.pt")
        set_pointer(tmp_path, "latest", "ep2-ba2.pt")
        set_pointer(tmp_path, "best", "ep1-ba1.pt")
        assert names(candidates(tmp_path)) == ["ep2-ba2.pt", "ep3-ba3.pt", "ep1-ba1.pt"]

    def test_a_missing_latest_changes_nothing(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt")
        set_pointer(tmp_path, "latest", "ep3-ba3.pt")
        assert names(candidates(tmp_path)) == ["ep2-ba2.pt", "ep1-ba1.pt"]

    def test_other_files_are_none(self, tmp_path: Path) -> None:
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
        assert newest_good(tmp_path) == (tmp_path / "ep2-ba2.pt", {"version": 1, "name": "ep2-ba2.pt"})
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
        assert "is damaged (it does not end with a checksum" in first
        assert first.endswith("): falling back to the one before")
        assert "ep3-ba3.pt is damaged (it is empty): falling back to the one before" in second

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

    def test_without_a_good_one_all_are_named(self, tmp_path: Path) -> None:
        fill(tmp_path, "ep1-ba1.pt", "ep2-ba2.pt")
        corrupt(tmp_path / "ep1-ba1.pt")
        (tmp_path / "ep2-ba2.pt").write_bytes(b"")
        with pytest.raises(CheckpointError, match="none of its checkpoints is good") as caught:
            newest_good(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "ep2-ba2.pt (it is empty), ep1-ba1.pt (it does not end" in str(caught.value)


class TestRemoval:
    def test_only_rests_of_dead_processes_are_stale(self, tmp_path: Path) -> None:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        stale = [f".ep1-ba1.pt.{pid}.tmp" for pid in (dead.pid, os.getpid())] + [f".latest.{dead.pid}.tmp"]
        fill(tmp_path, "ep1-ba1.pt")
        set_pointer(tmp_path, "latest", "ep1-ba1.pt")
        for name in (
            *stale,
            f".ep1-ba1.pt.{os.getppid()}.tmp",
            f"ep1-ba1.pt.{dead.pid}.tmp",
            f".ep1-ba1.pt.{dead.pid}.tmp2",
            f".notes.{dead.pid}.tmp",
            ".ep1-ba1.pt.x.tmp",
            ".hidden",
            "model.pt",
        ):
            (tmp_path / name).touch()
        (tmp_path / f".best.{dead.pid}.tmp").mkdir()
        before = {path.name for path in tmp_path.iterdir()}
        remove_stale(tmp_path)
        assert before - {path.name for path in tmp_path.iterdir()} == set(stale)
        assert {path.name for path in tmp_path.iterdir()} < before

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

    @pytest.mark.parametrize("keep", [-1, 1.0, True])
    def test_how_many_is_a_whole_number(self, tmp_path: Path, keep: Any) -> None:
        fill(tmp_path, "ep1-ba1.pt")
        with pytest.raises(ValueError, match="keep must be a whole number of at least 0, got"):
            remove_old(tmp_path, keep, ())
        assert names(candidates(tmp_path)) == ["ep1-ba1.pt"]
