"""Metrics of a model, such as those of torchmetrics, and their results."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import distributed


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check that metrics can be reduced over ranks.

    Raises:
        TypeError: If there are several ranks and a metric is no torchmetrics one.
    """
    if not metrics or distributed.world_size() == 1:
        return
    for name, metric in metrics.items():
        if not is_torchmetric(metric):
            raise TypeError(
                f"metrics must be torchmetrics.Metric on several ranks, {name} is a {type(metric).__name__}"
            )


def is_torchmetric(metric: Any) -> bool:
    """Whether a metric is one of torchmetrics."""
    from torchmetrics import Metric  # takes seconds to import

    return isinstance(metric, Metric)


def flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the result of a metric, which may be a dictionary or a tuple of them, each with its name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(f"{name}/{key}", item)
    elif isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        for index, item in enumerate(value):
            yield from flatten(f"{name}/{index}", item)
    else:
        yield name, torch.as_tensor(value)
