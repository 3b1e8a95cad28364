"""The commands on a folder of images: train, eval, predict, weights from a run, processes, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from etude.cli.main import main
from etude.models import create_model
from helpers.image_writing import truncate, write_folder, write_image

COUNTS = {"ant": 10, "bee": 10, "cat": 10}
OPTIONS = ["--batch-size", "8", "--image-size", "32", "--num-workers", "0", "--no-progress-bar"]


def train(data: Path | str, *arguments: str, model: str = "cifar_resnet20") -> None:
    main(["train", "--data", str(data), "--model", model, *OPTIONS, *arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and a finished run on them in runs/mine."""
    folder, before = tmp_path_factory.mktemp("work"), Path.cwd()
    write_folder(folder / "images", COUNTS)
    os.chdir(folder)
    try:
        train("images", "--run-name", "mine", "--max-duration", "6ep", "--augmentation", "none", "--lr", "0.01")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def copy(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(work, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_on_a_folder_reports_its_classes(work: Path) -> None:
    run = work / "runs" / "mine"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.5  # the classes differ in colour
    assert summary["test_top5_accuracy"] is None  # there are three classes
    assert json.loads((run / "classes.json").read_text()) == list(COUNTS)
    assert f"data: {work / 'images'}" in (run / "recipe.yaml").read_text()


def test_eval_agrees_with_the_training(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", "runs/mine"])
    output = capsys.readouterr().out
    found = json.loads((copy / "runs/mine/eval.json").read_text())
    summary = json.loads((copy / "runs/mine/summary.json").read_text())
    assert found["top1"] == pytest.approx(summary["test_accuracy"])
    assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-4)
    assert found["images"] == 6
    assert {name: part["images"] for name, part in found["per_class"].items()} == dict.fromkeys(COUNTS, 2)
    correct = sum(row[number] for number, row in enumerate(found["confusion"]))
    assert correct / 6 == pytest.approx(found["top1"])
    assert f"top-1 accuracy  {found['top1']:.2%}" in output
    assert (copy / "runs/mine/confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_evaluates_as_it_did_in_training(copy: Path) -> None:
    rows = [json.loads(line) for line in (copy / "runs/mine/metrics.jsonl").read_text().splitlines()]
    best = (copy / "runs/mine/checkpoints/best").read_text().strip()
    batch = int(best.removesuffix(".pt").partition("-ba")[2])
    (row,) = (row for row in rows if row["step"] == batch)
    main(["eval", "runs/mine", "--checkpoint", "best"])
    found = json.loads((copy / "runs/mine/eval.json").read_text())
    assert found["loss"] == pytest.approx(row["loss/eval/total"], rel=1e-4)
    assert found["top1"] == pytest.approx(row["metrics/eval/MulticlassAccuracy"])


def test_eval_takes_other_images_of_some_of_the_classes(copy: Path) -> None:
    other = write_folder(copy / "other", {"bee": 1, "cat": 4})
    (copy / "results").mkdir()
    main(["eval", "runs/mine", "--data", str(other), "--output", "results"])
    found = json.loads((copy / "results/eval.json").read_text())
    assert {name: part["images"] for name, part in found["per_class"].items()} == {"ant": 0, "bee": 1, "cat": 4}
    assert found["per_class"]["ant"]["accuracy"] is None


def test_predict_names_the_classes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [str(copy / "images" / name / "000.png") for name in COUNTS]
    main(["predict", "runs/mine", *images, "--top-k", "2", "--output", "found.json"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((copy / "found.json").read_text())
    assert [prediction["image"] for prediction in found] == images
    for line, prediction in zip(lines, found, strict=True):
        first, second = prediction["classes"]
        assert first["probability"] >= second["probability"]
        assert {first["name"], second["name"]} <= set(COUNTS)
        assert line.startswith(prediction["image"])
        assert f"{first['name']} {first['probability']:.1%}" in line


def test_predict_and_eval_agree(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "results").mkdir()
    main(["eval", "runs/mine", "--data", "images", "--output", "results"])
    confusion = json.loads((copy / "results/eval.json").read_text())["confusion"]
    main(["predict", "runs/mine", "images", "--output", "found.json"])
    counts = {name: dict.fromkeys(COUNTS, 0) for name in COUNTS}
    for prediction in json.loads((copy / "found.json").read_text()):
        counts[Path(prediction["image"]).parent.name][prediction["classes"][0]["name"]] += 1
    assert [list(row.values()) for row in counts.values()] == confusion


def test_a_new_training_starts_from_the_weights_of_a_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(copy / "more", {**COUNTS, "dog": 10})
    train("more", "--weights", "runs/mine", "--run-name", "more", "--max-duration", "1ba", "--freeze", "backbone")
    error = capsys.readouterr().err
    assert f"tensors taken from {copy / 'runs/mine'}; initialized randomly: fc.weight, fc.bias\n" in error
    before, after = (torch.load(copy / f"runs/{name}/weights.pt")["state_dict"] for name in ("mine", "more"))
    assert after["fc.weight"].shape[0] == 4
    folded = {"layer1.0.bn2.weight", "layer1.0.bn2.bias"}
    same = [name for name in before if name.partition(".")[0] != "fc" and torch.equal(before[name], after[name])]
    assert "conv1.weight" in same
    assert "bn1.running_mean" in same
    assert not folded & set(same)  # the drop rates of the first run are in the weights that the second started from


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_new_training_starts_from_a_file(suffix: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights: dict[str, Any] = dict(create_model("cifar_resnet20", 7).state_dict())
    weights["extra"] = torch.zeros(1)
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, copy / "w.pt")
    else:
        save_file(weights, copy / "w.safetensors")
    train("images", "--weights", f"w{suffix}", "--run-name", "new", "--max-duration", "1ba", "--head-lr", "0.1")
    error = capsys.readouterr().err
    assert "initialized randomly: fc.weight, fc.bias; not used: extra" in error


@pytest.mark.parametrize("model", ["resnet18", "timm:test_convnext"])
def test_networks_of_torchvision_and_timm_train_with_a_recipe(model: str, copy: Path) -> None:
    recipe = copy / "recipe.yaml"
    recipe.write_text("label_smoothing: 0.1\nema_half_life: 2ba\ngradient_clipping: 1.0\noptimizer: sgd\nlr: 0.01\n")
    train("images", "--recipe", str(recipe), "--run-name", "new", "--max-duration", "2ba", "--on-corrupt", "skip",
          model=model)  # fmt: skip
    main(["eval", "runs/new"])
    found, summary = (json.loads((copy / f"runs/new/{name}.json").read_text()) for name in ("eval", "summary"))
    assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-3)  # the averaged weights


def test_a_drop_path_of_the_network_is_taken_over(copy: Path) -> None:
    options = ["--drop-path-rate", "0.3", "--max-duration", "2ba", "--stochastic-method", "sample"]
    train("images", "--run-name", "new", *options, model="timm:test_convnext")
    settings = (copy / "runs/new/settings.json").read_text()
    assert '"scaling": null' in settings
    summary = json.loads((copy / "runs/new/summary.json").read_text())
    assert 0 < summary["expected_share_of_dropped_blocks"] < 0.3


def test_a_plain_network_trains_without_stochastic_depth(copy: Path) -> None:
    train("images", "--run-name", "new", "--drop-rate", "0", "--max-duration", "1ba", "--blurpool")
    summary = json.loads((copy / "runs/new/summary.json").read_text())
    assert "num_stochastic_layers" not in summary
    main(["eval", "runs/new"])
    found = json.loads((copy / "runs/new/eval.json").read_text())
    assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-4)  # with the filters of BlurPool


def run_command(folder: Path, *command: str, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_two_processes_train_together(copy: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "etude"]
    options = ["train", "--data", "images", "--model", "cifar_resnet20", *OPTIONS, "--max-duration", "2ep"]
    done = run_command(copy, *command, *options, "--run-name", "two", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert (copy / "runs/two/weights.pt").is_file()


@pytest.mark.slow
def test_a_run_that_is_killed_is_resumed_to_the_same_end(copy: Path) -> None:
    command = [sys.executable, "-m", "etude", "train"]
    options = ["--data", "images", "--model", "cifar_resnet20", *OPTIONS, "--max-duration", "30ep"]
    whole = run_command(copy, *command, *options, "--run-name", "whole")
    assert whole.returncode == 0, whole.stderr
    arguments = [*command, *options, "--run-name", "killed"]
    with subprocess.Popen(arguments, cwd=copy, stderr=subprocess.DEVNULL) as process:
        while not (copy / "runs/killed/checkpoints/ep3-ba9.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (copy / "runs/killed/weights.pt").exists()
    resumed = run_command(copy, *command, "--resume", "runs/killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "etude: resuming runs/killed at epoch" in resumed.stderr
    expected, found = (torch.load(copy / f"runs/{name}/weights.pt")["state_dict"] for name in ("whole", "killed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_corrupt_image_is_named_or_skipped(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(write_image(copy / "images/ant/bad.png"))
    with pytest.raises(SystemExit) as stop:
        train("images", "--run-name", "new", "--max-duration", "2ep")
    assert stop.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "images/ant/bad.png cannot be read as an image" in first
    assert "--on-corrupt skip" in first
    assert second == "continue it with: etude train --resume runs/new"
    train("images", "--run-name", "newer", "--max-duration", "1ep", "--on-corrupt", "skip")


def make_files(folder: Path) -> None:
    write_folder(folder / "images", {"ant": 3, "bee": 3})
    (folder / "empty").mkdir()
    (folder / "files").mkdir()
    write_image(folder / "files" / "image.png")
    write_folder(folder / "hole", {"ant": 3, "bee": 0})
    write_folder(folder / "single", {"ant": 3, "bee": 1})
    write_folder(folder / "split/train", {"ant": 3, "bee": 3})
    write_folder(folder / "split/val", {"ant": 3, "cow": 3})
    torch.save({"other": torch.zeros(1)}, folder / "other.pt")
    (folder / "garbage.pt").write_bytes(b"garbage")
    torch.save({"fc": [1]}, folder / "list.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    (folder / "taken").mkdir()
    (folder / "taken/runs").write_text("a file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "data must be an existing folder of images, digits, cifar10, cifar100"),
        (["--data", "empty"], "empty must hold one folder of images for each class, it has no folders"),
        (["--data", "files"], "files must hold one folder of images for each class, it has no folders"),
        (["--data", "hole"], "hole must have images of every class, there are none in bee"),
        (["--data", "single"], "every class must have at least 2 images"),
        (["--data", "split"], "split/val must have classes of"),
        (["--data", "cifar10:empty"], "data must hold cifar-10-batches-py as the archive of CIFAR10 unpacks"),
        (["--data", "imagenet:empty"], "data must hold the archives of ImageNet"),
        (["--data", "synthetic:1"], "data must be synthetic:CLASSES with at least 2 classes, got 'synthetic:1'"),
        (["images"], "etude train takes options only, got 'images'; data is given with --data"),
        (["--model", "resnet19"], "model must be the name of a torchvision network, timm:NAME or cifar_resnet20"),
        (["--weights", "nowhere.pt"], "weights must be a file of weights, there is none at"),
        (["--weights", "other.pt"], "weights must fit CIFARResNet except for its last layer, but"),
        (["--weights", "garbage.pt"], "weights must be a file of tensors that torch.load reads with weights_only=True"),
        (["--weights", "module.pt"], "weights must be a file of tensors that torch.load reads with weights_only=True"),
        (["--weights", "list.pt"], "weights must be a file of tensors by name"),
        (["--weights", "images"], "run must be the folder of a finished etude train, got"),
        (["--weights", "other.pt", "--pretrained", "DEFAULT"], "weights must not come with pretrained"),
        (["--freeze", "layer9"], "freeze must be names of modules of CIFARResNet such as conv1, bn1"),
        (["--freeze", "backbone", "fc"], "freeze must leave something to train, got backbone fc"),
        (["--freeze", "fc", "--head-lr", "0.1"], "head_lr must come with a last layer that is trained"),
        (["--drop-path-rate", "0.1"], "drop_path_rate must come with a network that has drop paths"),
        (["--batch-size", "1", "--model", "resnet18"], "batch_size must leave at least 2 images in every step"),
        (["--image-size", "32", "--model", "vgg11", "--drop-rate", "0", "--data", "digits", "--eval-fraction", "0.2"],
         "eval_fraction has no effect on digits, got 0.2"),
        (["--run-name", "../elsewhere"], "run_name must be letters, digits and . _ + -"),
        (["--run-name", ""], "run_name must be letters, digits and . _ + -"),
        (["--momentum", "0.9"], "momentum must come with optimizer sgd to have an effect, got 0.9"),
        (["--lr-milestones", "3ep"], "lr_milestones must come with lr_schedule multistep to have an effect"),
        (["--lr-schedule", "multistep"], "lr_schedule multistep must come with lr_milestones, got none"),
        (["--lr-schedule", "constant", "--lr-final", "0.1"], "lr_final must come with lr_schedule linear or cosine"),
        (["--clipping-type", "value"], "clipping_type must come with gradient_clipping to have an effect"),
        (["--ema-update-interval", "3ba"], "ema_update_interval must come with ema_half_life to have an effect"),
        (["--mixup-alpha", "0.2", "--cutmix-alpha", "1"], "mixup_alpha must not come with cutmix_alpha"),
        (["--drop-rate", "0", "--draws", "balanced"], "draws must come with a drop_rate above 0 to have an effect"),
        (["--download"], "download has no effect on folder, got True"),
        (["--resume", "runs/x", "--dry-run"], "dry_run must be without resume"),
        (["--lr-warmup", "9ep"], "t_warmup"),
        (["--on-corrupt", "ignore"], "--on-corrupt must be one of raise, skip, got 'ignore'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line_and_touches_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = dict.fromkeys(arguments)
    start = [] if "--data" in given else ["--data", "images"]
    start += [] if "--model" in given else ["--model", "cifar_resnet20"]
    start += [] if "--image-size" in given or "--data" in given else ["--image-size", "32"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *(arguments if arguments == ["images"] else [*start, *arguments])])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path / "taken")
    with pytest.raises(SystemExit) as stop:
        train("../images", "--run-name", "mine")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "etude: error: run_name must give a folder that can be written, runs is a file\n"


def test_other_classes_are_refused_when_a_run_is_resumed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "images/cat").rename(copy / "images/cow")
    (copy / "runs/mine/weights.pt").unlink()
    with pytest.raises(SystemExit):
        main(["train", "--resume", "runs/mine", "--data", "images"])
    assert "a resumed run must have the classes of runs/mine, but cat differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "runs/nowhere"], "run must be the folder of a finished etude train, got runs/nowhere"),
        (["eval", "runs/mine", "--data", "nowhere"], "data must be an existing folder of images"),
        (["eval", "runs/mine", "--data", "strange"], "strange must have classes of the network only, it has dog"),
        (["eval", "runs/mine", "--checkpoint", "last"], "checkpoint must be best, latest or a file, there is none"),
        (["eval", "runs/mine", "--output", "nowhere"], "output must be an existing folder, got 'nowhere'"),
        (["eval", "runs/mine", "--batch-size", "0"], "batch_size must be an int >= 1"),
        (["predict", "runs/mine"], "images must be files or folders, got none"),
        (["predict", "runs/mine", "nowhere.jpg"], "images must be files or folders, there is none at nowhere.jpg"),
        (
            ["predict", "runs/mine", "runs/mine/checkpoints"],
            "images must be files or folders of images, there are none",
        ),
        (["predict", "runs/mine", "bad.png"], "bad.png cannot be read as an image"),
        (["predict", "runs/mine", "images", "--top-k", "4"], "top_k must be from 1 to the 3 classes of the run, got 4"),
        (["predict", "runs/mine", "images", "--topk", "2"], "there is no option --topk, did you mean --top-k?"),
    ],
)
def test_bad_input_of_eval_and_predict_is_refused(
    arguments: list[str], message: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(copy / "strange", {"dog": 1})
    (copy / "bad.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_jpegs_and_grey_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, colour in (("ant", 30), ("bee", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("L", (30, 20), colour + number).save(tmp_path / "images" / name / f"{number}.JPG")
    monkeypatch.chdir(tmp_path)
    train("images", "--run-name", "grey", "--max-duration", "1ep", "--batch-size", "4")
    assert (tmp_path / "runs/grey/summary.json").is_file()
