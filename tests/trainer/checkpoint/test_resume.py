"""A resumed run is bit-identical to the uninterrupted run."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from etude import Callback, Logger, State, Trainer
from etude.trainer import CheckpointSaver, TrainingInterrupted
from helpers.networks import LinearModel, vectors
from helpers.resumable import NUM_STEPS, differences, fit, make_trainer, rows_of


def checkpoints(folder: Path) -> list[Path]:
    """In the order in which they were saved."""
    return sorted(
        folder.glob("*.pt"), key=lambda path: [int(n) for n in path.stem.removeprefix("ep").split("-ba")][::-1]
    )


@pytest.mark.parametrize(
    ("method", "num_workers"), [("block", 0), ("sample", 0), pytest.param("block", 2, marks=pytest.mark.slow)]
)
def test_a_resume_from_every_step_ends_as_the_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, num_workers: int
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = make_trainer(
        method=method,
        num_workers=num_workers,
        run_name="whole",
        callbacks=CheckpointSaver("saved", "1ba", num_to_keep=-1),
    )
    expected = fit(whole)
    saved = checkpoints(Path("saved"))
    assert len(saved) == NUM_STEPS + 2  # at the start, after every batch, at the end
    for path in saved:
        run = tmp_path / "runs" / path.stem
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_bytes((tmp_path / "runs" / "whole" / "metrics.jsonl").read_bytes())
        resumed = make_trainer(method=method, num_workers=num_workers, run_name=path.stem, load_path=path)
        assert differences(expected, fit(resumed)) == [], path.name
        assert rows_of(run) == rows_of(tmp_path / "runs" / "whole"), path.name


def test_a_resume_with_another_number_of_workers_is_the_same(tmp_path: Path) -> None:
    expected = fit(make_trainer(callbacks=CheckpointSaver(tmp_path, "3ba", num_to_keep=-1)))
    resumed = make_trainer(num_workers=2, load_path=tmp_path / "ep0-ba3.pt")
    assert differences(expected, fit(resumed)) == []


def test_a_resume_of_a_resume_is_the_same(tmp_path: Path) -> None:
    expected = fit(make_trainer(callbacks=CheckpointSaver(tmp_path / "1", "2ba", num_to_keep=-1)))
    fit(
        make_trainer(
            callbacks=CheckpointSaver(tmp_path / "2", "1ba", num_to_keep=-1), load_path=tmp_path / "1/ep0-ba2.pt"
        )
    )
    fit(
        make_trainer(
            callbacks=CheckpointSaver(tmp_path / "3", "1ba", num_to_keep=-1), load_path=tmp_path / "2/ep0-ba3.pt"
        )
    )
    assert differences(expected, fit(make_trainer(load_path=tmp_path / "3/ep1-ba7.pt"))) == []


def test_saving_changes_nothing(tmp_path: Path) -> None:
    assert differences(fit(make_trainer()), fit(make_trainer(save_folder=tmp_path, save_interval="1ba"))) == []


class TestTheLastBatchOfAnEpoch:
    """With a duration in batches, training may end where an epoch does, between its last batch and its end."""

    def trainer(self, **settings: Any) -> Trainer:
        torch.manual_seed(0)
        model = LinearModel()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = MultiStepLR(optimizer, milestones=[1, 1, 2], gamma=0.5)
        settings = {"max_duration": "12ba", "progress_bar": False, **settings}
        return Trainer(model, vectors(), optimizers=optimizer, schedulers=scheduler, **settings)

    def test_its_end_is_made_up_for(self, tmp_path: Path) -> None:
        expected = fit(self.trainer(callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)))
        assert expected["timestamp"].epoch == 2
        for name in ("ep0-ba6.pt", "ep1-ba12.pt", "ep2-ba12.pt"):
            assert differences(expected, fit(self.trainer(load_path=tmp_path / name))) == [], name

    def test_another_stepping_of_schedulers_is_refused(self, tmp_path: Path) -> None:
        fit(self.trainer(save_folder=tmp_path))
        with pytest.raises(ValueError, match="step_schedulers_every_batch: False -> True"):
            self.trainer(load_path=tmp_path, step_schedulers_every_batch=True)

    def test_a_signal_after_the_last_step_is_not_lost(self, tmp_path: Path) -> None:
        class Stop(Callback):
            def fit_end(self, state: State, logger: Logger) -> None:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(TrainingInterrupted) as stop:
            self.trainer(save_folder=tmp_path, callbacks=Stop()).fit()
        assert stop.value.code == 143
        assert (tmp_path / "ep2-ba12.pt").exists()


def test_a_folder_with_checkpoints_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(make_trainer(save_folder=tmp_path, save_interval="2ba"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) > 2
    with pytest.raises(FileExistsError, match="save_folder must not hold checkpoints of another run"):
        make_trainer(save_folder=tmp_path)
    with pytest.raises(FileExistsError, match="or later ones than the run starts from"):
        make_trainer(save_folder=tmp_path, load_path=tmp_path / "ep1-ba8.pt")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    fit(make_trainer(save_folder=tmp_path, load_path=tmp_path / "ep2-ba10.pt"))
