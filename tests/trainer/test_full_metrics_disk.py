"""Metrics files on a full disk: the training continues without them."""

import logging
from pathlib import Path
from typing import Any

import pytest

from etude import Callback
from etude.trainer import CheckpointSaver
from helpers.linear_training import make_linear_trainer
from helpers.networks import LinearModel
from helpers.resumable import differences, fit

FULL = Path("/dev/full")  # a write to it fails as on a full disk


class FillDisk(Callback):
    """From the second step on there is no space for metrics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def batch_start(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == 2:
            for name in ("metrics.jsonl", "metrics.csv"):
                (self.folder / name).unlink(missing_ok=True)
                (self.folder / name).symlink_to(FULL)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_the_training_ends_as_without_metrics_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = fit(make_linear_trainer(LinearModel()))
    saver = CheckpointSaver("saved", "1ba", num_to_keep=-1, on_full_disk="continue")
    callbacks = [FillDisk(tmp_path / "runs" / "mine"), saver]
    assert differences(expected, fit(make_linear_trainer(LinearModel(), run_name="mine", callbacks=callbacks))) == []
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert errors[0].startswith("FileLogger failed, training continues without it: OSError: [Errno 28]")
    resumed = make_linear_trainer(LinearModel(), run_name="again", load_path="saved/ep0-ba5.pt")
    assert differences(expected, fit(resumed)) == []
