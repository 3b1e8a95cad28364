"""Programs written for Composer's stochastic depth run with `composer` replaced by `etude`."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet50

import etude.functional as cf
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
