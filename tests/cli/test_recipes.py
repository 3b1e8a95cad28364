"""Every recipe trains, and a recipe that cannot be read is refused with its line."""

from dataclasses import replace
from pathlib import Path

import pytest

from etude.cli.data import read_source
from etude.cli.main import main
from etude.cli.options import DataOptions, TrainOptions
from etude.cli.recipe import FOLDER, apply_recipe, read_options, recipe_names, write_recipe
from helpers.image_writing import write_both_cifars, write_folder, write_imagenet

FAST = {"resnet110-cifar10"}  # the others are of large networks, or as these


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in recipe_names()]
)
def test_a_recipe_trains_evaluates_and_saves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = read_options(FOLDER / f"{name}.yaml").data.data
    kind = "folder" if data == "digits" else read_source(data).kind
    arguments = ["--image-size", "32"]
    if kind == "imagenet":
        data = f"imagenet:{write_imagenet(tmp_path / 'imagenet', {'n01': 8, 'n02': 8})}"
    elif kind == "folder":
        data = str(write_folder(tmp_path / "images", {"ant": 10, "bee": 10}))
    else:
        data = f"{kind}:{write_both_cifars(tmp_path / 'cifar', monkeypatch)}"
    if "resize_size" in (FOLDER / f"{name}.yaml").read_text():
        arguments += ["--resize-size", "32"]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main(
        ["train", "--recipe", name, "--data", data, "--batch-size", "4", "--num-workers", "0", "--dry-run", *arguments]
    )
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert lines["time per step"].strip().startswith("about ")
    assert lines["peak memory"].strip().endswith("(memory of the process)")
    assert sorted(tmp_path.rglob("*")) == before


def test_there_is_a_recipe_for_every_paper() -> None:
    assert {
        *("resnet50-imagenet-0.1", "resnet50-imagenet-0.2", "resnet101-imagenet-0.4", "resnet110-cifar10"),
        *("resnet110-cifar100", "resnet152-imagenet", "vit-progressive", "resnet50-modern", "resnet50-mild"),
        *("resnet50-medium", "finetune", "deit-small", "convnext-tiny"),
    } == set(recipe_names())


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1\ndrop_rte: 0.2\n", "mine.yaml, line 2: there is no option 'drop_rte', did you mean drop_rate?"),
        ("# mine\nepochs: 90\n", "mine.yaml, line 2: there is no option 'epochs', did you mean max_duration?"),
        ("drop-rate: 0.2\n", "mine.yaml, line 1: there is no option 'drop-rate', did you mean drop_rate?"),
        ("lr: high\n", "mine.yaml, line 1: lr must be a number, got 'high'"),
        ("lr: true\n", "mine.yaml, line 1: lr must be a number, got True"),
        ("lr: [0.1, 0.2]\n", "mine.yaml, line 1: lr must be a number, got [0.1, 0.2]"),
        ("batch_size: 12.5\n", "mine.yaml, line 1: batch_size must be an int, got 12.5"),
        ("optimizer: lion\n", "mine.yaml, line 1: optimizer must be one of adamw, sgd, got 'lion'"),
        ("nesterov: 1\n", "mine.yaml, line 1: nesterov must be true or false, got 1"),
        ("model:\n  name: resnet18\n", "mine.yaml, line 1: model must be a word, got {'name': 'resnet18'}"),
        ("lr: 0.1\n\nlr: 0.2\n", "mine.yaml, line 3: lr is set in line 1 already"),
        ("run_name: mine\n", "mine.yaml, line 1: run_name is given to the command, as --run-name, and not in a recipe"),
        ("- lr\n", "mine.yaml must hold options and their values, such as lr: 0.1"),
        ("lr: [0.1\n", "mine.yaml must be a YAML file of options: while parsing a flow sequence"),
        ("lr: !!python/name:os.system\n", "mine.yaml, line 1: lr must be a plain value"),
        ("lr: -1\n", "lr must be a finite number > 0, got -1.0"),
    ],
)
def test_a_recipe_with_an_error_is_refused_with_its_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", str(path)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_recipe_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for name, hint in (("resnet50-midl", "did you mean resnet50-mild?"), ("xyz", "; there are convnext-tiny, deit")):
        with pytest.raises(SystemExit):
            main(["train", "--recipe", name])
        assert hint in capsys.readouterr().err


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    values = {"lr": 1e-05, "freeze": ("conv1", "layer1"), "drop_rate": None, "nesterov": True, "on_corrupt": "skip"}
    options = TrainOptions().with_values(**values)
    assert options.optimization.lr == 1e-05
    write_recipe(options, tmp_path / "mine.yaml", "Mine.")
    assert read_options(tmp_path / "mine.yaml") == options


def test_what_a_recipe_does_not_set_stays_as_it_is(tmp_path: Path) -> None:
    before = replace(TrainOptions(), data=DataOptions(data="cifar10", image_size=64))
    after = apply_recipe(write(tmp_path, "lr: 1e-3\nimage_size: 48\n"), before)
    assert (after.data.data, after.data.image_size, after.optimization.lr) == ("cifar10", 48, 1e-3)


def test_options_of_the_command_replace_those_of_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "lr: 0.1\nmodel: cifar_resnet20\nmomentum: 0.5\n")
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(path), "--lr", "-2"])
    assert "lr must be a finite number > 0, got -2.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--recipe", str(path)])
    assert "momentum must come with optimizer sgd to have an effect, got 0.5" in capsys.readouterr().err
