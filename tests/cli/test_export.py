"""`etude export`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

from etude.algorithms import StochasticDepth
from etude.cli.main import main
from etude.cli.trained import Recorded, load_trained, record_depth, save_trained
from etude.models import composer_resnet
from etude.trainer import load_weights
from helpers.networks import images
from helpers.resumable import differences


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A run's folder, an input, and what its network made of the input in evaluation."""
    from etude import Trainer

    model = composer_resnet("resnet18", num_classes=3, zero_init_residual=False)
    algorithm = StochasticDepth(drop_rate=0.5, drop_warmup="1.0dur")
    Trainer(
        model,
        images(8, 4, size=16),
        max_duration="2ba",
        algorithms=algorithm,
        progress_bar=False,
        save_folder=tmp_path / "checkpoints",
    ).fit()
    known = {"class_names": ("a", "b", "c"), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    depth = record_depth(algorithm.plan, "block")
    save_trained(tmp_path, model.module, Recorded(model="resnet18", image_size=16, resize_size=16, **known, **depth))
    x = torch.randn(2, 3, 16, 16)
    return tmp_path, x, model.eval()((x, None)).detach()


def test_the_exported_network_evaluates_as_the_trained_one(run: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    folder, x, expected = run
    main(["export", str(folder)])
    plain = resnet18(num_classes=3).eval()
    plain.load_state_dict(load_file(folder / "network.safetensors"))
    assert torch.allclose(plain(x), expected, atol=1e-5)
    assert (folder / "network.safetensors").stat().st_mode & 0o777 == (folder / "weights.pt").stat().st_mode & 0o777
    trained = load_trained(folder)
    assert trained.recorded.image_size == 16
    assert torch.allclose(trained.network(x), expected, atol=1e-6)


def test_the_exported_weights_are_those_of_load_weights(run: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    folder, _, _ = run
    main(["export", str(folder)])
    loaded = load_weights(folder / "checkpoints")
    exported = load_file(folder / "network.safetensors")
    loaded = {name.removeprefix("module."): value for name, value in loaded.items()}
    assert differences(dict(sorted(loaded.items())), dict(sorted(exported.items()))) == []


def test_the_output_can_be_named(run: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    folder, _, _ = run
    main(["export", str(folder), "--output", str(folder / "other.safetensors")])
    assert (folder / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "net.txt"], "output must end in .safetensors, .pt2, .onnx, got 'net.txt'"),
        (
            ["--output", "net.onnx", "--export-format", "safetensors"],
            "export_format must be onnx for net.onnx, got 'safetensors'",
        ),
        (["--output", "nowhere/net.onnx"], "output must be a file in an existing folder, there is none at nowhere"),
    ],
)
def test_a_contradiction_is_refused(
    run: tuple[Path, torch.Tensor, torch.Tensor],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run[0])
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run[0]), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in run[0].iterdir()} == {"weights.pt", "checkpoints"}


def test_the_suffix_chooses_the_format(run: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    folder, x, expected = run
    main(["export", str(folder), "--output", str(folder / "net.pt2")])
    program = torch.export.load(folder / "net.pt2")
    assert torch.allclose(program.module()(x), expected, atol=1e-5)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[()]]:
        return (Path("/tmp/etude-payload-ran").touch, ())  # would run if the file were unpickled


def test_a_file_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "missing": (None, "run must be the folder of a finished etude train"),
        "garbage": (b"garbage", "must be a weights file of etude train, but it cannot be read"),
        "other": ({"a": 1}, "must be a weights file of etude train, but its contents differ"),
        "payload": (_Payload(), "must be a weights file of etude train, but it cannot be read"),
    }
    for name, (contents, message) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        if isinstance(contents, bytes):
            (folder / "weights.pt").write_bytes(contents)
        elif contents is not None:
            torch.save(contents, folder / "weights.pt")
        with pytest.raises(SystemExit) as exit:
            main(["export", str(folder)])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
        assert not (folder / "network.safetensors").exists()
