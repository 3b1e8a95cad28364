"""Programs written for Composer's algorithms run with `composer` replaced by `etude`."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet50

import etude.functional as cf
from etude import algorithms
from etude.algorithms import StochasticDepth
from etude.models import composer_resnet
from etude.trainer import Trainer

METHODS = ["block", "sample"]


@pytest.fixture
def dataloader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))), batch_size=4)


@pytest.mark.parametrize("stochastic_method", METHODS)
def test_the_functional_form_in_a_loop(stochastic_method: Any, dataloader: DataLoader[Any]) -> None:
    model = resnet50(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    returned = cf.apply_stochastic_depth(
        model,
        target_layer_name="ResNetBottleneck",
        stochastic_method=stochastic_method,
        drop_rate=0.2,
        drop_distribution="linear",
    )
    assert returned is model
    for X, y in dataloader:
        loss = F.cross_entropy(model(X), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    rates = [module.drop_rate for module in model.modules() if hasattr(module, "drop_rate")]
    assert rates == pytest.approx([0.2 * block / 16 for block in range(1, 17)])


@pytest.mark.parametrize("stochastic_method", METHODS)
def test_the_algorithm_in_a_trainer(stochastic_method: Any, dataloader: DataLoader[Any]) -> None:
    model = composer_resnet(model_name="resnet50", num_classes=10)
    stochastic_depth = StochasticDepth(
        target_layer_name="ResNetBottleneck",
        stochastic_method=stochastic_method,
        drop_rate=0.2,
        drop_distribution="uniform",
        drop_warmup="0.5dur",
        use_same_gpu_seed=True,
    )
    trainer = Trainer(
        model=model,
        train_dataloader=dataloader,
        eval_dataloader=dataloader,
        max_duration="1ep",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        algorithms=[stochastic_depth],
    )
    trainer.fit()
    assert trainer.state.timestamp.batch == 2
    rates = [module.drop_rate for module in model.modules() if hasattr(module, "drop_rate")]
    assert rates == pytest.approx([0.2] * 16)


def test_arguments_may_be_given_by_position_in_composers_order() -> None:
    model = resnet50()
    cf.apply_stochastic_depth(model, "ResNetBottleneck", "block", 0.1, "uniform")
    assert {module.drop_rate for module in model.modules() if hasattr(module, "drop_rate")} == {0.1}
    algorithm = StochasticDepth("ResNetBottleneck", "sample", 0.1, "uniform", 0.5)
    assert (algorithm.stochastic_method, algorithm.drop_rate, algorithm.drop_warmup) == ("sample", 0.1, 0.5)


KEYS = {"input_key": 0, "target_key": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "BlurPool": {"replace_convs": True, "replace_maxpools": True, "blur_first": True, "min_channels": 16},
    "ChannelsLast": {},
    "CutMix": {"alpha": 1.0, "interpolate_loss": False, "uniform_sampling": False, **KEYS},
    "LabelSmoothing": {"smoothing": 0.1, "target_key": 1},
    "MixUp": {"alpha": 0.2, "interpolate_loss": False, **KEYS},
    "ProgressiveResizing": {
        "mode": "resize",
        "initial_scale": 0.5,
        "finetune_fraction": 0.2,
        "delay_fraction": 0.5,
        "size_increment": 4,
        "resize_targets": False,
        **KEYS,
    },
    "SAM": {"rho": 0.05, "epsilon": 1e-12, "interval": 1},
}
FUNCTIONS = {
    "apply_blurpool": ["model", "replace_convs", "replace_maxpools", "blur_first", "min_channels"],
    "apply_channels_last": ["model"],
    "cutmix_batch": ["input", "target", "length", "alpha", "bbox", "indices", "uniform_sampling"],
    "mixup_batch": ["input", "target", "mixing", "alpha", "indices"],
    "resize_batch": ["input", "target", "scale_factor", "mode", "resize_targets"],
    "smooth_labels": ["logits", "target", "smoothing"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_algorithms_have_composers_settings_in_its_order_with_its_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(algorithms, name)).parameters.values()
    assert [(each.name, each.default) for each in parameters] == list(SETTINGS[name].items())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_composers_arguments_in_its_order(name: str) -> None:
    parameters = inspect.signature(getattr(cf, name)).parameters.values()
    by_position = [each.name for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert by_position == FUNCTIONS[name]


def test_the_functional_forms_in_one_loop(dataloader: DataLoader[Any]) -> None:
    model = resnet50(num_classes=10)
    cf.apply_blurpool(model, replace_convs=True, replace_maxpools=True, blur_first=True)
    cf.apply_channels_last(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for X, y in dataloader:
        X, y = cf.resize_batch(X, y, scale_factor=0.5, mode="resize", resize_targets=False)
        X_mixed, y_perm, mixing = cf.mixup_batch(X, y, alpha=0.2)
        y_hat = model(X_mixed)
        loss = (1 - mixing) * F.cross_entropy(y_hat, y) + mixing * F.cross_entropy(y_hat, y_perm)
        X_cutmix, y_perm, area, _ = cf.cutmix_batch(X, y, alpha=0.2)
        y_hat = model(X_cutmix)
        loss = loss + area * F.cross_entropy(y_hat, y) + (1 - area) * F.cross_entropy(y_hat, y_perm)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
