"""A classifier around any network, with the methods that the Trainer needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.checks import check_int
from .composer_model import ComposerModel

if TYPE_CHECKING:
    from torchmetrics import Metric


class ComposerClassifier(ComposerModel):
    """A network with a loss and evaluation metrics, for batches of ``(inputs, targets)``.

    The network itself is unchanged in ``.module``, whose ``state_dict`` can be loaded without this wrapper.

    Args:
        module: Maps inputs ``(N, ...)`` to logits ``(N, num_classes)``.
        num_classes: Number of classes, at least 2.
        loss_fn: Called with the logits and the targets; targets are class indices ``(N,)`` or, if an algorithm
            changed them, probabilities ``(N, num_classes)``.
        train_metrics: Metrics of torchmetrics by name that are computed while training; by default none.
        val_metrics: Metrics of torchmetrics by name that are computed in evaluation; by default top-1 accuracy.

    Raises:
        TypeError: If `num_classes` is not an int, `loss_fn` cannot be called, or a metric is none of torchmetrics.
        ValueError: If `num_classes` is less than 2.
    """

    def __init__(
        self,
        module: nn.Module,
        num_classes: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        *,
        train_metrics: Mapping[str, Metric] | None = None,
        val_metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of logits and targets, got {loss_fn!r}")
        self.module = module
        self.num_classes = check_int("num_classes", num_classes, ge=2)
        self.loss_fn = loss_fn
        # In dictionaries, as a Metric is a module and would become a part of this one.
        self._train_metrics = _check_metrics("train_metrics", {} if train_metrics is None else train_metrics)
        self._val_metrics = None if val_metrics is None else _check_metrics("val_metrics", val_metrics)

    def forward(self, batch: Any) -> Tensor:
        """The logits ``(N, num_classes)`` of the inputs of `batch`, which needs no targets here."""
        if isinstance(batch, Tensor):
            return self.module(batch)
        is_alone = isinstance(batch, (tuple, list)) and len(batch) == 1
        return self.module(batch[0] if is_alone else _inputs_and_targets(batch)[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean loss over the batch."""
        _, targets = _inputs_and_targets(batch)
        return self.loss_fn(outputs, targets)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Fresh metrics by name: `train_metrics` in training, `val_metrics` in evaluation."""
        if is_train:
            return {name: metric.clone() for name, metric in self._train_metrics.items()}
        if self._val_metrics is not None:
            return {name: metric.clone() for name, metric in self._val_metrics.items()}
        # torchmetrics takes seconds to import, and training alone does not need it.
        from torchmetrics.classification import MulticlassAccuracy

        return {"MulticlassAccuracy": MulticlassAccuracy(self.num_classes, average="micro")}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        """Add one batch to `metric`; of targets that are probabilities it sees the most probable class."""
        _, targets = _inputs_and_targets(batch)
        is_soft = targets.is_floating_point() and targets.shape == outputs.shape
        metric.update(outputs, targets.argmax(1) if is_soft else targets)


def _check_metrics(name: str, metrics: Any) -> dict[str, Metric]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{name} must be a dictionary of torchmetrics objects by name, got {metrics!r:.100}")
    for key, metric in metrics.items():
        if not all(hasattr(metric, method) for method in ("update", "compute", "clone")):
            raise TypeError(f"{name} must be torchmetrics objects by name, got {metric!r:.100} for {key!r}")
    return dict(metrics)


def _inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"a batch must be a pair (inputs, targets), got a {type(batch).__name__}{size}")
    return batch[0], batch[1]
