import contextlib
import csv
import inspect
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from etude.algorithms import StochasticDepth
from etude.cli.main import main
from etude.cli.packages import check_packages
from etude.cli.resume import locate
from etude.cli.train import count_batches, train
from etude.datasets.digits import digits_dataloaders

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
    files = {"metrics.jsonl", "metrics.csv", "settings.json", "summary.json", "weights.pt", "run.png"}
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


def test_the_defaults_are_those_of_the_algorithm() -> None:
    ours = inspect.signature(train).parameters
    theirs = inspect.signature(StochasticDepth).parameters
    for name in ("drop_rate", "stochastic_method", "drop_distribution"):
        assert ours[name].default == theirs[name].default


def options(**changed: object) -> list[str]:
    return ["train", *(f"--{name}={value}" for name, value in {**OPTIONS, **changed}.items()), "--no-progress-bar"]


def test_a_run_goes_on_from_its_folder_to_the_same_end(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    shutil.copytree(folder.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "runs" / "short"
    for name in ("checkpoints/ep0-ba8.pt", "checkpoints/latest", "summary.json", "weights.pt"):
        (copy / name).unlink()
    main([*options(), "--resume=runs/short"])
    assert (copy / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    assert (copy / "summary.json").read_text() == (folder / "summary.json").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"resume": "runs/nowhere"}, "resume must be auto, a run's folder or a checkpoint, got 'runs/nowhere'"),
        ({"resume": "runs/short", "drop-rate": 0.4}, "the settings must be those of the run that is resumed"),
        ({"resume": "runs/short", "lr": 0.1}, "optimizers.0.groups.0.lr"),
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


def test_auto_needs_a_name() -> None:
    with pytest.raises(ValueError, match="resume=auto needs a run_name, got none"):
        locate("auto", None, "resnet50")
    assert locate("auto", "mine", "resnet50") == ("mine", {"autoresume": True})
    assert locate(None, "mine", "resnet50") == ("mine", {})
