"""Two ranks equal DistributedDataParallel, and one process on the joined batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import etude.functional as cf
from etude import Trainer
from etude.algorithms import StochasticDepth
from etude.algorithms.stochastic_depth.plan import Draws
from etude.trainer import CheckpointSaver, distributed
from helpers.networks import LinearModel, images, vectors
from helpers.parallel_training import (
    assert_same_on_all_ranks,
    freeze_batchnorm,
    largest_difference,
    make_model,
    sgd,
    train,
    train_alone,
)
from helpers.ranks import on_ranks
from helpers.resumable import differences, make_trainer, result_of


def train_with_ddp(data: Any, num_steps: int, **settings: Any) -> nn.Module:
    """The same training with DistributedDataParallel in a loop of its own."""
    model = cf.apply_stochastic_depth(make_model(), **settings)
    parallel, optimizer = DistributedDataParallel(model, find_unused_parameters=True), sgd(model)
    step = 0
    while step < num_steps:
        for X, y in data:
            mine = slice(dist.get_rank() * len(X) // 2, (dist.get_rank() + 1) * len(X) // 2)
            optimizer.zero_grad()
            model.loss(parallel([X[mine], y[mine]]), [X[mine], y[mine]]).backward()
            optimizer.step()
            step += 1
            if step == num_steps:
                break
    return model


@on_ranks(2)
def test_same_plan_equals_ddp() -> None:
    data = images(num_samples=40, batch_size=4)
    model = make_model()
    algorithm = StochasticDepth(drop_rate=0.6)
    train(model, data, "20ba", algorithm)
    assert 0.05 < sum(algorithm.realized_drop_rates) / 6 < 0.95
    assert largest_difference(model, train_with_ddp(data, 20, drop_rate=0.6)) == 0.0
    assert_same_on_all_ranks(model)


@on_ranks(2)
@pytest.mark.parametrize("draws", ["independent", "balanced"])
def test_different_plans_equal_ddp(draws: Draws) -> None:
    data = images(num_samples=40, batch_size=4)
    model = make_model()
    algorithm = StochasticDepth(drop_rate=0.6, use_same_gpu_seed=False, draws=draws)
    train(model, data, "20ba", algorithm)
    mine, other = distributed.gather(algorithm.realized_drop_rates)
    assert mine != other
    if draws == "balanced":
        assert sum(mine) == sum(other), "every rank drops as many blocks"
    reference = train_with_ddp(data, 20, drop_rate=0.6, use_same_gpu_seed=False, draws=draws)
    assert largest_difference(model, reference) == 0.0
    assert_same_on_all_ranks(model)


@on_ranks(2)
@pytest.mark.parametrize("draws", ["independent", "balanced"])
def test_sample_method_neither_hangs_nor_diverges(draws: Draws) -> None:
    model = make_model()
    algorithm = StochasticDepth(drop_rate=0.8, stochastic_method="sample", drop_distribution="uniform", draws=draws)
    train(model, images(num_samples=24, batch_size=4), "12ba", algorithm)
    assert_same_on_all_ranks(model)


@on_ranks(2)
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_two_ranks_equal_one_on_the_joined_batch(microbatch_size: int | None) -> None:
    """Also with a last batch that does not divide: 15 samples in batches of 6 leave 3, shared 1 and 2."""
    data = images(num_samples=15, batch_size=6)
    model = freeze_batchnorm(make_model())
    train(model, data, "3ep", StochasticDepth(drop_rate=0.5), device_train_microbatch_size=microbatch_size)
    alone = train_alone(freeze_batchnorm(make_model()), data, 3)
    assert largest_difference(model, alone) < 1e-5
    assert largest_difference(model, make_model()) > 1e-2


@on_ranks(2)
@pytest.mark.parametrize(("parallelism", "momentum"), [("ddp", 0.1), ("ddp", None), ("fsdp", 0.1)])
def test_two_ranks_with_synchronised_batchnorm_equal_one(parallelism: str, momentum: float | None) -> None:
    """With and without momentum of the statistics, as copies and as shards; the last batch is shared 1 and 2."""
    data = images(num_samples=15, batch_size=6)
    dataset: Any = data.dataset
    X, y = dataset.tensors
    dataset.tensors = (X.double() + 3.0, y)
    model, alone = make_model().double(), make_model().double()
    for module in [*model.modules(), *alone.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    train(model, data, "3ep", StochasticDepth(drop_rate=0.5), sync_batchnorm=True, parallelism=parallelism)
    train_alone(alone, data, 3)
    found, expected = model.state_dict(), alone.state_dict()
    assert list(found) == list(expected)
    assert any("running_var" in name for name in expected)
    for name, tensor in found.items():
        tensor = tensor.full_tensor() if parallelism == "fsdp" and hasattr(tensor, "full_tensor") else tensor
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-12), (parallelism, momentum, name)
    assert largest_difference(alone, make_model().double()) > 1e-2
    if parallelism == "ddp":  # what is converted may be trained again
        train(cf.remove_stochastic_depth(model), data, "1ba", sync_batchnorm=True)


@on_ranks(2)
def test_ranks_begin_with_the_weights_of_rank_zero() -> None:
    torch.manual_seed(dist.get_rank())
    model = LinearModel()
    assert distributed.gather(float(model.linear.weight[0, 0].detach()))[0] != distributed.gather(0.0)[0]
    train(model, vectors(), "1ba")
    assert_same_on_all_ranks(model)


@on_ranks(2)
def test_every_sample_is_evaluated_once() -> None:
    for num_samples, batch_size in ((5, 2), (7, 3), (9, 4), (2, 4), (33, 16)):
        data = images(num_samples=num_samples, batch_size=batch_size)
        model = make_model()
        trainer = Trainer(model, eval_dataloader=data, progress_bar=False)
        metrics = trainer.eval()
        model.eval()
        X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        with torch.no_grad():
            outputs = model([X, y])
        assert abs(metrics["loss/eval/total"] - float(model.loss(outputs, [X, y]))) < 1e-5
        accuracy = float((outputs.argmax(1) == y).float().mean())
        assert abs(metrics["metrics/eval/MulticlassAccuracy"] - accuracy) < 1e-6


@pytest.mark.slow
@on_ranks(2)
@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_resume_from_every_step_ends_as_the_uninterrupted_run(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(method=method, callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=-1))
    trainer.fit()
    expected = result_of(trainer)
    saved = sorted(tmp_path.glob("*.pt"))
    assert len(saved) == 12
    for path in saved:
        trainer = make_trainer(method=method, load_path=path)
        trainer.fit()
        found = differences(expected, result_of(trainer))
        assert found == [], (path.name, found)
