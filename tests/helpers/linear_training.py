"""Training of a linear model."""

from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from etude import Trainer
from helpers.networks import LinearModel, vectors


def make_linear_trainer(model: nn.Module | None = None, **settings: Any) -> Trainer:
    """Two epochs of six batches of four rows with momentum on a CPU; `settings` add to that or replace it."""
    torch.manual_seed(0)
    model = LinearModel() if model is None else model
    defaults = {
        "train_dataloader": vectors(),
        "max_duration": "2ep",
        "optimizers": SGD(model.parameters(), lr=0.1, momentum=0.9),
        "device": "cpu",
        "progress_bar": False,
    }
    return Trainer(model, **{**defaults, **settings})
