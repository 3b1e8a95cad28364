"""Export to ONNX and torch.export."""

from pathlib import Path

import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file
from torch import nn

import etude.functional as cf
from etude.models import export
from helpers.networks import tiny_resnet


@pytest.fixture
def folded() -> nn.Module:
    torch.manual_seed(0)
    model = cf.apply_stochastic_depth(tiny_resnet(2), drop_rate=0.5)
    return cf.fold_stochastic_depth(model).module.eval()


def test_safetensors_hold_the_weights_of_the_plain_network(folded: nn.Module, tmp_path: Path) -> None:
    cf.export_network(folded, tmp_path / "network.safetensors", "safetensors")
    plain = tiny_resnet(2).module.eval()
    plain.load_state_dict(load_file(tmp_path / "network.safetensors"))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(x), folded(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_export_holds_the_network_for_any_batch(folded: nn.Module, tmp_path: Path) -> None:
    cf.export_network(folded, tmp_path / "network.pt2", "torch_export", (3, 8, 8))
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for num_samples in (1, 5):
        x = torch.randn(num_samples, 3, 8, 8)
        assert torch.allclose(loaded(x), folded(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_holds_the_network_for_any_batch(folded: nn.Module, tmp_path: Path) -> None:
    cf.export_network(folded.train(), tmp_path / "network.onnx", "onnx", (3, 8, 8))
    assert folded.training  # exporting changes nothing
    evaluator = ReferenceEvaluator(str(tmp_path / "network.onnx"))
    for num_samples in (1, 5):
        x = torch.randn(num_samples, 3, 8, 8)
        (outputs,) = evaluator.run(None, {"inputs": x.numpy()})
        assert torch.allclose(torch.tensor(outputs), folded.eval()(x), atol=1e-5)


def test_a_network_with_stochastic_depth_is_refused(tmp_path: Path) -> None:
    model = cf.apply_stochastic_depth(tiny_resnet().module)
    with pytest.raises(ValueError, match=r"network must be plain .*: fold_stochastic_depth\(model\) comes first"):
        cf.export_network(model, tmp_path / "network.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_refused_for_its_network(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"network must map inputs to outputs, got a ComposerClassifier: export its .module"
    ):
        cf.export_network(tiny_resnet(), tmp_path / "network.safetensors", "safetensors")


def test_an_unknown_format_or_a_missing_package_is_refused(
    folded: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="export_format must be one of safetensors, torch_export, onnx, got 'pickle'"):
        cf.export_network(folded, tmp_path / "network", "pickle")
    monkeypatch.setitem(export._PACKAGES, "onnx", ("nosuchpackage",))
    with pytest.raises(ValueError, match=r"needs nosuchpackage installed: pip install -e '.\[export\]'"):
        cf.export_network(folded, tmp_path / "network", "onnx")
    assert not list(tmp_path.iterdir())
