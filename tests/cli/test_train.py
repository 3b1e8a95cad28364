import contextlib
import csv
import inspect
import io
import json
import os
import shlex
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest

from etude.algorithms import StochasticDepth
from etude.cli.main import main
from etude.cli.options import DepthOptions, TrainerOptions
from etude.cli.packages import check_packages
from etude.cli.resume import locate
from etude.cli.train import TrainOptions, count_batches
from etude.datasets.digits import digits_dataloaders
from etude.loggers import ProgressBar
from etude.trainer import Trainer

pytestmark = pytest.mark.xdist_group("etude train")  # whose costly fixture is made once

OPTIONS = {
    "model": "resnet50",
    "max-duration": "8ba",
    "batch-size": 8,
    "image-size": 8,
    "drop-rate": 0.5,
    "drop-warmup": "2ba",
    "eval-interval": "4ba",
    "label-smoothing": 0.1,
    "save-interval": "4ba",
    "run-name": "short",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run of the real command; its folder and what it printed."""
    folder, before = tmp_path_factory.mktemp("work"), Path.cwd()
    output = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output):
            main(["train", *(f"--{name}={value}" for name, value in OPTIONS.items()), "--no-progress-bar"])
    finally:
        os.chdir(before)
    return folder / "runs" / "short", output.getvalue()


def test_a_run_leaves_its_files(run: tuple[Path, str]) -> None:
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    files = {"metrics.jsonl", "metrics.csv", "settings.json", "options.json", "summary.json", "weights.pt", "run.png"}
    assert names == files | {"checkpoints"}
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "run.png").stat().st_size > 10_000


def test_the_summary_agrees_with_the_metrics(run: tuple[Path, str]) -> None:
    folder, _ = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, 9))
    dropped = sum(row["stochastic_depth/num_dropped_layers"] for row in rows)
    assert dropped > 0
    assert summary["realized_share_of_dropped_blocks"] == pytest.approx(dropped / (16 * 8))
    rates = [row["stochastic_depth/drop_rate"] for row in rows]
    assert rates == [0.0, 0.25, *[0.5] * 6]
    assert summary["expected_share_of_dropped_blocks"] == pytest.approx(sum(rates) / 8 * 17 / 32)
    assert 0 < summary["expected_share_of_training_macs_saved"] < 0.5
    assert summary["test_accuracy"] == rows[-1]["metrics/eval/MulticlassAccuracy"]
    assert summary["batches"] == 8
    assert summary["num_stochastic_layers"] == 16


def test_the_table_shows_the_summary(run: tuple[Path, str]) -> None:
    folder, output = run
    summary = json.loads((folder / "summary.json").read_text())
    assert f"test accuracy        {100 * summary['test_accuracy']:.2f}%" in output
    assert f"{100 * summary['realized_share_of_training_macs_saved']:.2f}% realized" in output
    assert "no full epoch" in output


def test_the_csv_holds_the_same_rows(run: tuple[Path, str]) -> None:
    folder, _ = run
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(table) == len(rows) == 8
    for line, row in zip(table, rows, strict=True):
        assert {name: float(text) for name, text in line.items() if text} == pytest.approx(row)


@pytest.mark.parametrize(
    ("duration", "batches"), [("2ep", 90), ("7ba", 7), ("1437sp", 45), ("1438sp", 46), ("32sp", 1), ("33sp", 2)]
)
def test_count_batches_agrees_with_the_dataloader(duration: str, batches: int) -> None:
    assert count_batches(duration, digits_dataloaders(32, 8).train_dataloader) == batches


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(ValueError, match=r"etude train needs nosuchpackage installed: pip install -e '.\[cli\]'"):
        check_packages("train", "json", "nosuchpackage")


def test_options_of_stochastic_depth_have_its_defaults() -> None:
    """Those of a network that brings no drop rates of its own; the command's networks bring none."""
    theirs = {setting.name: setting.default for setting in fields(StochasticDepth)}
    ours = {option.name: option.default for option in fields(DepthOptions) if option.name in theirs}
    assert len(ours) == 8
    without_model = {"drop_rate": 0.2, "scaling": "evaluation", "drop_warmup": "0.0dur"}
    assert ours == {name: without_model.get(name, theirs[name]) for name in ours}


def test_options_of_the_trainer_are_its_arguments() -> None:
    assert {option.name for option in fields(TrainerOptions)} <= set(inspect.signature(Trainer).parameters)


@pytest.mark.parametrize("name", ["drop_warmup", "start_late", "stop_early", "progressive_gamma"])
def test_a_schedule_without_drops_is_refused(name: str) -> None:
    value = 0.5 if name == "progressive_gamma" else "0.2dur"
    with pytest.raises(ValueError, match=f"{name} must come with a drop_rate above 0 to have an effect"):
        DepthOptions(**{"drop_rate": 0.0, name: value}).build()


def options(**changed: object) -> list[str]:
    return ["train", *(f"--{name}={value}" for name, value in {**OPTIONS, **changed}.items()), "--no-progress-bar"]


def test_a_run_goes_on_from_its_folder_to_the_same_end(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    shutil.copytree(folder.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "runs" / "short"
    for name in ("checkpoints/ep0-ba8.pt", "checkpoints/latest", "summary.json", "weights.pt"):
        (copy / name).unlink()
    capsys.readouterr()
    main([*options(), "--resume=runs/short"])
    assert "etude: resuming runs/short at epoch 0, batch 4\n" in capsys.readouterr().err
    assert (copy / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    assert (copy / "summary.json").read_text() == (folder / "summary.json").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resume": "runs/nowhere"}, "resume must be auto, a run's folder or a checkpoint, got 'runs/nowhere'"),
        (
            {"resume": "runs/short", "drop-rate": 0.4, "lr": 0.1, "max-duration": "9ba"},
            "a resumed run must have the options of runs/short, but --drop-rate was 0.5 and is 0.4, "
            "--max-duration was 8ba and is 9ba, --lr was 0.002 and is 0.1",
        ),
        ({}, "there is a run in runs/short already: --resume runs/short continues it, and another --run-name"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(
    run: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, object],
    message: str,
) -> None:
    folder, _ = run
    monkeypatch.chdir(folder.parents[1])
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(options(**changed))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_auto_needs_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--resume auto needs a --run-name, got none"):
        locate(TrainOptions(resume="auto"))
    assert locate(TrainOptions(resume="auto", run_name="mine")) == ("mine", {"autoresume": True})
    assert locate(TrainOptions(run_name="mine")) == ("mine", {})


def test_a_finished_run_says_so(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run[0].parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    main(options(resume="auto"))
    assert "etude: runs/short at epoch 0, batch 8 is finished: nothing is left to train" in capsys.readouterr().err


def test_an_interrupted_run_prints_the_command_that_continues_it(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ProgressBar, "batch_end", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        main([*options()[:-1], "--progress-bar"])
    assert stop.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert line.startswith("continue it with: etude train --drop-rate 0.5 ")
    assert line.endswith(" --resume runs/short")
    main(shlex.split(line.partition(": etude ")[2]))
    assert (tmp_path / "runs/short/summary.json").read_text() == (run[0] / "summary.json").read_text()
