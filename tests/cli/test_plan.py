"""`etude plan`."""

import re
from pathlib import Path

import pytest

from etude.cli.main import main


def test_it_lists_every_block_and_what_is_saved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    main(["plan", "resnet50", "--drop-rate", "0.5", "--picture", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("layer") for line in lines) == 16
    assert any(line.split() == ["training", "MACs", "23.69%", "88.27%"] for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "num_rows"),
    [
        (["vit_b_16", "--drop-unit", "branch"], 24),
        (["vit_b_16"], 24),
        (["cifar_resnet20", "--image-size", "32", "--protect-projections"], 9),
        (["resnext50_32x4d"], 16),
        (["timm:resnet10t"], 4),
    ],
)
def test_it_takes_every_residual_network(
    arguments: list[str], num_rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert sum("layer" in line.split()[0] for line in lines if line.split()) == num_rows


def test_it_says_what_is_not_converted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "timm:gcvit_xxtiny"])
    output = capsys.readouterr().out
    assert re.search(
        r"^not converted: \d+ MbConvBlock: not a known type of block and without a drop path$", output, re.M
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["resnet51"],
            "timm:NAME or cifar_resnet20 to cifar_resnet1202, got 'resnet51'",
        ),
        (["cifar_resnet21"], "depth must be 6n + 2"),
        (["alexnet"], "model must contain residual blocks of a known type"),
        (["resnet50", "--drop-rate", "-1"], "drop_rate must be a number in [0, 1], got -1.0"),
        (["resnet50", "--drop-unit", "branch"], "drop_unit must be 'block'"),
        (["vit_b_16", "--image-size", "100"], "input_shape must be the shape of one sample of the model"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["plan", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
