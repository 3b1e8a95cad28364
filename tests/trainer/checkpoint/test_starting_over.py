"""Weights only, shards, and other ways to start from a checkpoint."""

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etude import Callback, Logger, State, Trainer
from etude.trainer import CheckpointSaver, distributed
from etude.trainer.checkpoint import file as checkpoint_file
from helpers.linear_training import make_linear_trainer
from helpers.networks import LinearModel, vectors


def make_trainer(model: nn.Module | None = None, **settings: Any) -> Trainer:
    return make_linear_trainer(model, **{"eval_dataloader": vectors(num_samples=8), **settings})


def stop_at(batch: int) -> Callback:
    class Stop(Callback):
        def batch_checkpoint(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch == batch:
                os.kill(os.getpid(), signal.SIGTERM)

    return Stop()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_interrupted_fine_tuning_is_resumed() -> None:
    make_trainer(save_folder="before").fit()
    settings = {"load_path": "before", "load_weights_only": True, "autoresume": True, "save_folder": "tuned"}
    first = make_trainer(**settings, callbacks=stop_at(5))
    assert first.state.timestamp.batch == 0
    with pytest.raises(SystemExit):
        first.fit()
    again = make_trainer(**settings)
    assert again.state.timestamp.batch == 6
    assert again.state.optimizers[0].state_dict()["state"] != {}


def test_taking_weights_does_not_touch_the_metrics_of_another_run() -> None:
    make_trainer(save_folder="before", run_name="old").fit()
    before = Path("runs/old/metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="must not hold metrics of another run"):
        make_trainer(load_path="before", load_weights_only=True, run_name="old")
    with pytest.raises(FileExistsError, match="must not hold checkpoints of another run"):
        make_trainer(load_path="before", load_weights_only=True, save_folder="before")
    assert Path("runs/old/metrics.jsonl").read_bytes() == before


def test_a_folder_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    make_trainer(save_folder="ck").fit()
    make_trainer(save_folder="ck", load_path=tmp_path / "ck" / "ep2-ba12.pt")
    make_trainer(save_folder="ck/../ck", load_path="ck")


def test_buffers_that_are_not_among_the_weights_are_kept() -> None:
    class Counting(LinearModel):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()), persistent=False)

        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            if self.training:
                self.steps += 1
            return super().forward(batch) * (1 + self.steps)

    whole = make_trainer(Counting(), callbacks=CheckpointSaver("saved", "1ba", num_to_keep=-1))
    whole.fit()
    resumed = make_trainer(Counting(), load_path="saved/ep0-ba3.pt")
    assert resumed.state.model.steps == 3
    resumed.fit()
    assert torch.equal(whole.state.model.linear.weight, resumed.state.model.linear.weight)


def test_the_best_of_another_folder_is_not_the_best_here() -> None:
    make_trainer(callbacks=CheckpointSaver("one", "1ba", num_to_keep=-1, best="min:loss/eval/total")).fit()
    shutil.move("one/ep0-ba3.pt", "start.pt")
    make_trainer(callbacks=CheckpointSaver("two", best="min:loss/eval/total"), load_path="one/ep1-ba6.pt").fit()
    assert (Path("two") / Path("two/best").read_text().strip()).is_file()


def test_a_stop_that_cannot_be_saved_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        if Path("full").exists():
            raise OSError(errno.ENOSPC, "No space left on device")

    class Fill(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch == 4:
                Path("full").touch()
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint_file.os, "fsync", full)
    trainer = make_trainer(callbacks=[Fill(), CheckpointSaver("saved", on_full_disk="continue")])
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert sorted(path.name for path in Path("saved").iterdir()) == ["ep0-ba0.pt", "latest"]


def test_processes_that_could_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 must come with LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        make_trainer()


@pytest.mark.parametrize("missing", ["gloo", "nccl"])
def test_a_missing_backend_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in (
        ("WORLD_SIZE", "2"),
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "x"),
        ("MASTER_PORT", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda backend: backend != missing)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    with pytest.raises(RuntimeError, match=f"needs torch with the backend {missing}, got one without"):
        distributed.join_process_group(torch.device("cuda"), timeout=1.0)
