"""The command line: help, errors, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

import etude
from etude.cli.main import main


def test_help_imports_nothing_heavy() -> None:
    """Which is what keeps it under a second."""
    code = (
        "import sys\nfrom etude.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "print([m for m in ('torch', 'numpy', 'sklearn', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--drop-rate" in done.stdout
    assert done.stderr.strip() == "[]"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"etude {etude.__version__}\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "etude", "--help"], capture_output=True, text=True, check=True)
    assert "train" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop-rate", "1.5"], "drop_rate must be a number in [0, 1], got 1.5"),
        (["--drop-warmup", "9ep"], 'drop_warmup must not be longer than max_duration="6ep", got "9ep"'),
        (["--max-duration", "soon"], "max_duration: a time string must be like"),
        (["--max-duration", "0ep"], 'max_duration must be positive, got "0ep"'),
        (["--batch-size", "0"], "batch_size must be an int >= 1, got 0"),
        (["--image-size", "4"], "image_size must be an int >= 8"),
        (["--label-smoothing", "2"], "smoothing must be a number in [0, 1], got 2.0"),
        (["--seed", "-1"], "seed must be an int in [0, 2**32)"),
        (["--run-name", "../elsewhere"], "run_name must be letters, digits"),
        (["--device", "abacus"], "device must be"),
        (["--lr", "-1"], "lr must be a finite number > 0, got -1.0"),
        (["--drop-rate", "0", "--drop-warmup", "0.2dur"], "drop_warmup must come with a drop_rate above 0"),
        (["--epochs", "3"], "there is no option --epochs, did you mean --max-duration? etude train --help lists all"),
        (["--drop_rat=3"], "there is no option --drop_rat, did you mean --drop-rate?"),
        (["--data-dir", "x"], "there is no option --data-dir, did you mean --data? etude train --help lists all"),
        (["--amp"], "there is no option --amp, did you mean --precision?"),
        (["--batch=3"], "there is no option --batch, did you mean --batch-size?"),
        (["-b", "3"], "there is no option -b, did you mean --batch-size?"),
        (["--no-deterministic"], "did you mean --deterministic-mode?"),
        (["--lr", "high"], "--lr must be a number, got 'high'; etude train --help explains it"),
        (["--lr"], "--lr must be a number, got none"),
        (["--optimizer", "lion"], "--optimizer must be one of adamw, sgd, got 'lion'"),
        (["--nesterov", "yes"], "--nesterov takes no value, got 'yes'; --no-nesterov turns it off"),
        (["--xyzzy"], "there is no option --xyzzy; etude train --help lists all"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["train", "--model", "resnet50", *arguments])
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("etude: error: ")
    assert message in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["train", "--model", "resnet51"], ["train", "--drop-rate", "high"], ["dance"], []]
)
def test_options_that_cannot_be_read_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err


def test_a_missing_command_line_library_is_named_with_its_remedy() -> None:
    code = "import sys; sys.modules['tyro'] = None; from etude.cli.main import main; main(['train'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "etude: the command line needs some packages more: pip install -e '.[cli]'"
