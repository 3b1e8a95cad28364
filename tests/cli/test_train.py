"""`etude train`."""

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
from typing import Any

import pytest

from etude.algorithms import StochasticDepth
from etude.cli.algorithms import build_stochastic_depth
from etude.cli.main import main
from etude.cli.options import DepthOptions, TrainerOptions, TrainOptions
from etude.cli.packages import check_packages
from etude.cli.recipe import read_options
from etude.cli.resume import locate
from etude.loggers import ProgressBar
from etude.trainer import Trainer

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
FILES = {
    *("metrics.jsonl", "metrics.csv", "settings.json", "recipe.yaml", "classes.json"),
    *("summary.json", "weights.pt", "run.png", "checkpoints"),
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("time/", "throughput/", "step_time/")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def results_of(folder: Path) -> dict[str, Any]:
    """The summary without what the clock says."""
    summary = json.loads((folder / "summary.json").read_text())
    timed = ("seconds_per_epoch", "images_per_second", "share_of_time_waiting_for_data")
    return {name: value for name, value in summary.items() if name not in timed}


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
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "run.png").stat().st_size > 10_000
    assert json.loads((folder / "classes.json").read_text()) == [str(digit) for digit in range(10)]


def test_the_summary_agrees_with_the_metrics(run: tuple[Path, str]) -> None:
    folder, _ = run
    rows = rows_of(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, 9))
    dropped = sum(row["stochastic_depth/num_dropped_layers"] for row in rows)
    assert dropped > 0
    assert summary["realized_share_of_dropped_blocks"] == pytest.approx(dropped / (16 * 8))
    rates = [row["stochastic_depth/drop_rate"] for row in rows]
    assert rates == [0.0, 0.25, *[0.5] * 6]
    assert summary["expected_share_of_dropped_blocks"] == pytest.approx(sum(rates) / 8 * 17 / 32)
    assert 0 < summary["expected_share_of_training_macs_saved"] < 0.5
    accuracies = [row["metrics/eval/MulticlassAccuracy"] for row in rows if "metrics/eval/MulticlassAccuracy" in row]
    assert summary["test_accuracy"] == accuracies[-1]
    assert summary["best_test_accuracy"] == max(accuracies)
    assert summary["test_top5_accuracy"] == rows[-1]["metrics/eval/MulticlassTop5Accuracy"]
    assert summary["best_checkpoint"] == (folder / "checkpoints/best").read_text().strip()
    assert summary["images_per_second"] > 0
    assert 0 <= summary["share_of_time_waiting_for_data"] <= 1
    assert summary["batches"] == 8
    assert summary["num_stochastic_layers"] == 16


def test_the_table_shows_the_summary(run: tuple[Path, str]) -> None:
    folder, output = run
    summary = json.loads((folder / "summary.json").read_text())
    lines = {line[:20].strip(): line[20:].strip() for line in output.splitlines() if line}
    assert lines["test accuracy"] == f"{100 * summary['test_accuracy']:.2f}%"
    assert lines["test accuracy, top 5"] == f"{100 * summary['test_top5_accuracy']:.2f}%"
    assert lines["images per second"] == f"{summary['images_per_second']:.1f}"
    assert f"{100 * summary['realized_share_of_training_macs_saved']:.2f}% realized" in output
    assert "no full epoch" in output
    assert "etude eval runs/short\n" in output


def test_the_csv_holds_the_same_rows(run: tuple[Path, str]) -> None:
    folder, _ = run
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = rows_of(folder)
    assert len(table) == len(rows) == 8
    for line, row in zip(table, rows, strict=True):
        assert {name: float(text) for name, text in line.items() if text} == pytest.approx(row)


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(ValueError, match=r"etude train needs nosuchpackage installed: pip install -e '.\[cli\]'"):
        check_packages("train", "json", "nosuchpackage")


def test_options_of_stochastic_depth_have_its_defaults() -> None:
    theirs = {setting.name: setting.default for setting in fields(StochasticDepth)}
    ours = {option.name: option.default for option in fields(DepthOptions) if option.name in theirs}
    assert len(ours) == 9
    assert ours == {name: "0.0dur" if name == "drop_warmup" else theirs[name] for name in ours}


def test_options_of_the_trainer_are_its_arguments() -> None:
    assert {option.name for option in fields(TrainerOptions)} <= set(inspect.signature(Trainer).parameters)


@pytest.mark.parametrize("name", ["drop_warmup", "start_late", "stop_early", "progressive_gamma", "draws"])
def test_an_option_about_drops_is_refused_where_nothing_is_dropped(name: str) -> None:
    value = {"progressive_gamma": 0.5, "draws": "balanced"}.get(name, "0.2dur")
    with pytest.raises(ValueError, match=f"{name} must come with a drop_rate above 0 to have an effect"):
        build_stochastic_depth(DepthOptions(**{"drop_rate": 0.0, name: value}))


def options(**changed: object) -> list[str]:
    return ["train", *(f"--{name}={value}" for name, value in {**OPTIONS, **changed}.items()), "--no-progress-bar"]


def forget_the_end(run: Path) -> None:
    """As a run that was killed after four batches."""
    for name in ("checkpoints/ep0-ba8.pt", "checkpoints/latest", "summary.json", "weights.pt"):
        (run / name).unlink(missing_ok=True)


@pytest.mark.parametrize("is_repeated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_is_resumed_to_the_same_end(
    run: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_repeated: bool,
) -> None:
    folder, _ = run
    shutil.copytree(folder.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "runs" / "short"
    forget_the_end(copy)
    capsys.readouterr()
    main([*(options() if is_repeated else ["train"]), "--resume=runs/short"])
    assert "etude: resuming runs/short at epoch 0, batch 4\n" in capsys.readouterr().err
    assert without_times(rows_of(copy)) == without_times(rows_of(folder))
    assert results_of(copy) == results_of(folder)


@pytest.mark.slow
def test_a_run_is_repeated_from_its_recipe_alone(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    monkeypatch.chdir(tmp_path)
    main(["train", "--recipe", str(folder / "recipe.yaml"), "--run-name", "again"])
    again = tmp_path / "runs" / "again"
    assert without_times(rows_of(again)) == without_times(rows_of(folder))
    assert results_of(again) == results_of(folder)
    assert read_options(again / "recipe.yaml") == read_options(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resume": "runs/nowhere"}, "resume must be auto, a run's folder or a checkpoint, got 'runs/nowhere'"),
        (
            {"resume": "runs/short", "drop-rate": 0.4, "lr": 0.1, "max-duration": "9ba"},
            "a resumed run must have the options of runs/short, but --max-duration was 8ba and is 9ba, "
            "--lr was 0.002 and is 0.1, --drop-rate was 0.5 and is 0.4",
        ),
        ({}, "there is a run in runs/short already: --resume runs/short continues it, and another --run-name"),
    ],
)
def test_runs_that_cannot_be_resumed_are_refused_in_one_line(
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


@pytest.mark.slow
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
    assert line == "continue it with: etude train --resume runs/short"
    main(shlex.split(line.partition(": etude ")[2]))
    assert results_of(tmp_path / "runs/short") == results_of(run[0])
