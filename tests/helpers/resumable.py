"""A small training that uses everything a checkpoint must restore."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from etude import Trainer
from etude.algorithms import LabelSmoothing, StochasticDepth
from etude.models import ComposerClassifier
from helpers.networks import images, tiny_resnet

NUM_SAMPLES, BATCH_SIZE = 18, 4  # five batches per epoch, the last one of two rows
NUM_STEPS = 10


class NoisyImages(Dataset):
    """Images with noise from every global generator, as augmentation draws it."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(num_samples, 3, 8, 8, generator=generator)
        self.classes = torch.randint(0, 3, (num_samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.randn(3, 8, 8)  # noqa: NPY002
        return self.images[index] + noise, self.classes[index]


def make_model() -> ComposerClassifier:
    """BatchNorm and dropout, whose state a checkpoint must restore."""
    torch.manual_seed(3)
    network = tiny_resnet()
    network.module.insert(len(network.module) - 1, nn.Dropout(0.2))
    return network


def make_trainer(
    *,
    method: str = "block",
    num_workers: int = 0,
    optimizer: Any = None,
    max_duration: str = "2ep",
    **settings: Any,
) -> Trainer:
    """A Trainer of two epochs with momentum, a schedule per batch, and both algorithms."""
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3) if optimizer is None else optimizer
    return Trainer(
        model,
        DataLoader(NoisyImages(), BATCH_SIZE, shuffle=True, num_workers=num_workers),
        images(num_samples=5, batch_size=2),
        max_duration,
        algorithms=[
            StochasticDepth(drop_rate=0.5, stochastic_method=method, drop_warmup="0.5dur"),
            LabelSmoothing(0.1),
        ],
        optimizers=optimizer,
        schedulers=OneCycleLR(optimizer, max_lr=0.1, total_steps=NUM_STEPS),
        step_schedulers_every_batch=True,
        progress_bar=False,
        **settings,
    )


def result_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that must be the same at the end, however often the training was interrupted."""
    state = trainer.state
    return {
        "model": {name: tensor.clone() for name, tensor in state.model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in state.schedulers],
        "algorithms": [(algorithm.state_dict(), algorithm.rank_state_dict()) for algorithm in state.algorithms],
        "timestamp": state.timestamp,
        "eval_metrics": state.eval_metrics,
        "generators": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]],  # noqa: NPY002
    }


def fit(trainer: Trainer) -> dict[str, Any]:
    """Train to the end; what came of it."""
    trainer.fit()
    result = result_of(trainer)
    trainer.close()
    return result


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of every step without what is measured by a clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time/epoch_seconds"} for row in rows]


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two nested results differ in a single bit."""
    if isinstance(one, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        same = np.array_equal(one, other)
    elif isinstance(one, dict):
        if list(one) != list(other):
            return [f"{place}: {list(one)} != {list(other)}"]
        return [text for key in one for text in differences(one[key], other[key], f"{place}.{key}")]
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{place}: {len(one)} != {len(other)}"]
        return [
            text
            for key, pair in enumerate(zip(one, other, strict=True))
            for text in differences(*pair, f"{place}.{key}")
        ]
    else:
        same = one == other
    return [] if same else [place]
