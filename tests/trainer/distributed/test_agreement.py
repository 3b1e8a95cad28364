"""Settings and data that differ between ranks raise on all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from etude import Trainer
from etude.algorithms import StochasticDepth
from helpers.networks import LinearModel, images, vectors
from helpers.parallel_training import make_model, refused, train
from helpers.ranks import on_ranks


@on_ranks(2)
def test_different_settings_are_refused() -> None:
    rank = dist.get_rank()
    with refused("rank 1 differs from rank 0 in seed: 0 -> 1"):
        train(LinearModel(), vectors(), "1ba", seed=rank)
    with refused("rank 1 differs from rank 0 in algorithms.0"):
        train(make_model(), images(), "1ba", StochasticDepth(drop_rate=0.1 + 0.1 * rank))


@on_ranks(2)
def test_a_bad_setting_of_one_rank_is_refused_on_all() -> None:
    with refused("max_nonfinite_steps must be an int >= 0, got -1"):
        train(LinearModel(), vectors(), "1ba", max_nonfinite_steps=-dist.get_rank())


@on_ranks(2)
def test_saving_on_one_rank_only_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_folder": tmp_path} if dist.get_rank() == 0 else {}
    with refused("rank 1 differs from rank 0 in save_folder"):
        train(LinearModel(), vectors(), "1ba", **settings)


@on_ranks(2)
def test_evaluating_on_one_rank_only_is_refused() -> None:
    data: dict[str, Any] = {"eval_dataloader": vectors()} if dist.get_rank() == 0 else {}
    with refused("rank 1 differs from rank 0 in eval"):
        Trainer(LinearModel(), progress_bar=False, **data)


DATA_THAT_CANNOT_BE_SHARED = {
    "batch_size that world_size=2 divides, got 5": lambda: vectors(num_samples=10, batch_size=5),
    "at least one sample for each of world_size=2 ranks, got 1": lambda: vectors(num_samples=1, batch_size=2),
    "drop_last=True": lambda: vectors(num_samples=9, batch_size=4),
    "must be a torch DataLoader over a map-style dataset": lambda: list(vectors()),
}


@on_ranks(2)
@pytest.mark.parametrize("message", DATA_THAT_CANNOT_BE_SHARED)
def test_data_that_cannot_be_shared_is_refused(message: str) -> None:
    with refused(message):
        train(LinearModel(), DATA_THAT_CANNOT_BE_SHARED[message](), "1ba")


@on_ranks(2)
def test_a_wrapped_model_is_refused() -> None:
    model: Any = nn.Sequential(DistributedDataParallel(LinearModel()))
    model.loss = lambda outputs, batch: outputs.sum()
    with refused("must not be wrapped for parallel training"):
        train(model, vectors(), "1ba")


@on_ranks(2)
def test_fsdp_with_different_plans_is_refused() -> None:
    for depth in (StochasticDepth(use_same_gpu_seed=False), StochasticDepth(stochastic_method="sample")):
        with refused("needs all ranks to compute the same blocks"):
            train(make_model(), images(), "1ba", depth, parallelism="fsdp")


@on_ranks(2)
def test_fsdp_with_microbatches_needs_batches_that_divide() -> None:
    data = images(num_samples=15, batch_size=6)
    with refused("use drop_last=True"):
        train(make_model(), data, "1ep", parallelism="fsdp", device_train_microbatch_size=1)
