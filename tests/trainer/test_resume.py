"""A resumed run is the uninterrupted run, to the bit."""

from pathlib import Path

import pytest

from etude import Trainer
from etude.trainer import CheckpointSaver
from resumable import NUM_STEPS, differences, make_trainer, result_of, rows_of


def fit(trainer: Trainer) -> dict:
    trainer.fit()
    result = result_of(trainer)
    trainer.close()
    return result


def checkpoints(folder: Path) -> list[Path]:
    """In the order in which they were saved."""
    return sorted(
        folder.glob("*.pt"), key=lambda path: [int(n) for n in path.stem.removeprefix("ep").split("-ba")][::-1]
    )


@pytest.mark.parametrize(("method", "num_workers"), [("block", 0), ("sample", 0), ("block", 2)])
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
    for path in saved[:: 1 if num_workers == 0 else 3]:
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
