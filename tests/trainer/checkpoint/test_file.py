"""Writing and reading checkpoint files."""

import enum
import errno
import io
import os
import random
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR
from torch.utils.serialization import config

from etude.trainer.checkpoint.file import VERSION, read_checkpoint, write_checkpoint
from etude.trainer.checkpoint.folder import (
    candidates,
    read_pointer,
    remove_stale,
    set_pointer,
)
from helpers.checkpoint_files import OLD, fails, repacked, same, sealed, torch_bytes

NEW = {"version": VERSION, "new": torch.arange(3000.0)}


def round_trip(path: Path, value: Any) -> Any:
    write_checkpoint(path, {"version": VERSION, "value": value})
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
    def test_plain_values_are_restored(self, path: Path, value: Any) -> None:
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
    def test_tensors_are_restored_bit_for_bit(self, path: Path, tensor: Tensor) -> None:
        assert same(round_trip(path, tensor), tensor)

    def test_sparse_tensors_are_restored(self, path: Path) -> None:
        assert torch.equal(round_trip(path, torch.eye(3).to_sparse()).to_dense(), torch.eye(3))

    def test_attributes_of_tensors_are_restored(self, path: Path) -> None:
        for tensor in (torch.ones(2), nn.Parameter(torch.ones(2))):
            tensor.tag = {"group": (1, "a")}  # type: ignore[attr-defined]
            assert same(round_trip(path, tensor), tensor)

    def test_tensors_that_share_memory_still_do(self, path: Path) -> None:
        whole = torch.arange(10.0)
        loaded, part = round_trip(path, [whole, whole[3:5]])
        part.zero_()
        assert loaded.tolist() == [0, 1, 2, 0, 0, 5, 6, 7, 8, 9]

    @pytest.mark.parametrize("make", [AdamW, lambda p: AdamW(p, amsgrad=True), lambda p: SGD(p, 0.1, momentum=0.9)])
    def test_training_continues_identically_from_a_loaded_state(self, path: Path, make: Any) -> None:
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
    def test_schedulers_are_restored(self, path: Path, make: Any) -> None:
        optimizer = SGD([nn.Parameter(torch.ones(1))], 0.1, momentum=0.9)
        scheduler = make(optimizer)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        state = scheduler.state_dict()
        assert same(round_trip(path, state), state)

    def test_a_gradient_scaler_is_restored(self, path: Path) -> None:
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
        with cast(Any, config).patch("load.mmap", True), torch.device("meta"):
            assert same(read_checkpoint(path), OLD)

    def test_tensors_of_a_missing_device_are_loaded_to_the_cpu(self, path: Path) -> None:
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
    def test_values_that_do_not_load_safely_are_refused_with_their_path(
        self, path: Path, value: Any, name: str
    ) -> None:
        write_checkpoint(path, OLD)
        contents = {"version": VERSION, "callbacks": [{"state": OrderedDict(x=value)}]}
        with pytest.raises(TypeError, match=r"^callbacks\.0\.state\.x must be plain values and tensors") as caught:
            write_checkpoint(path, contents)
        assert str(caught.value).endswith(name)
        assert same(read_checkpoint(path), OLD)
        assert list(path.parent.iterdir()) == [path]

    def test_nested_tensors_are_refused(self, path: Path) -> None:
        with pytest.warns(UserWarning, match="nested"):
            nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
        with pytest.raises(TypeError, match=r"^x must be plain values and tensors"):
            write_checkpoint(path, {"version": VERSION, "x": nested})

    @pytest.mark.parametrize(
        "holder", [torch.ones(1), nn.Parameter(torch.ones(1)), OrderedDict(a=1)], ids=["tensor", "parameter", "dict"]
    )
    def test_attributes_are_looked_at_too(self, path: Path, holder: Any) -> None:
        with pytest.raises(TypeError, match=r"^model\.tag must be plain"):
            write_checkpoint(path, {"version": VERSION, "model": with_attribute(holder)})

    def test_keys_are_looked_at_too(self, path: Path) -> None:
        with pytest.raises(TypeError, match=r"^the key of a must be plain .* too long an int"):
            write_checkpoint(path, {"version": VERSION, "a": {2**2039: 1}})

    @pytest.mark.parametrize("key", [None, (1, 2), np.float64(1), Colour.RED])
    def test_keys_are_strings_or_numbers(self, path: Path, key: Any) -> None:
        with pytest.raises(TypeError, match=r"^the keys of a\.1 must be strings or numbers"):
            write_checkpoint(path, {"version": VERSION, "a": [0, {key: 1}]})

    def test_members_of_sets_are_looked_at_too(self, path: Path) -> None:
        with pytest.raises(TypeError, match=r"^what is in a must be plain"):
            write_checkpoint(path, {"version": VERSION, "a": {1, Path("a")}})

    @pytest.mark.parametrize(
        "contents",
        [
            {},
            {"version": VERSION + 1},
            {"version": True},
            {"version": float(VERSION)},
            {"version": "1"},
            [("version", VERSION)],
            None,
        ],
    )
    def test_contents_of_another_version_are_refused(self, path: Path, contents: Any) -> None:
        with pytest.raises(ValueError, match=r'^contents must be a dict with "version" \d, got a|got version \d$'):
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
                write_checkpoint(path, {"version": VERSION, "a": number, "b": number.view(torch.int32)})

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


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after_it(
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
from etude.trainer.checkpoint.file import VERSION, write_checkpoint

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
        write_checkpoint(Path(folder) / "ep1-ba5.pt", {"version": VERSION, "new": torch.arange(3000.0)})
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
