from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

from etude.algorithms import StochasticDepth
from etude.cli.main import main
from etude.cli.weights import load_folded, save_weights
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
    save_weights(tmp_path / "weights.pt", "resnet18", model.module, algorithm, image_size=16)
    x = torch.randn(2, 3, 16, 16)
    return tmp_path, x, model.eval()((x, None)).detach()


def test_the_exported_network_evaluates_as_the_trained_one(run: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    folder, x, expected = run
    main(["export", str(folder)])
    plain = resnet18(num_classes=3).eval()
    plain.load_state_dict(load_file(folder / "network.safetensors"))
    assert torch.allclose(plain(x), expected, atol=1e-5)
    assert load_folded(folder / "weights.pt")[1] == 16


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


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[()]]:
        return (Path("/tmp/etude-payload-ran").touch, ())  # would run if the file were unpickled


def test_what_is_no_weights_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
