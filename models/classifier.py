"""A classifier around any network, with the methods that the Trainer needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.checks import check_int

if TYPE_CHECKING:
    from torchmetrics import Metric


class ComposerClassifier(nn.Module):
    """A network with a loss and evaluation metrics, for batches of ``(inputs, targets)``.

    The network itself is unchanged in ``.module``, whose ``state_dict`` can be loaded without this wrapper.

    Args:
        module: Maps inputs ``(N, ...)`` to logits ``(N, num_classes)``.
        num_classes: Number of classes, at least 2.
        loss_fn: Called with the logits and the targets; targets are class indices ``(N,)`` or, if an algorithm
            changed them, probabilities ``(N, num_classes)``.

    Raises:
        TypeError: If `num_classes` is not an int.
        ValueError: If it is less than 2.
    """

    def __init__(
        self,
        module: nn.Module,
        num_classes: int,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        super().__init__()
        self.module = module
        self.num_classes = check_int("num_classes", num_classes, ge=2)
        self.loss_fn = loss_fn

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
        """Fresh metrics by name: top-1 accuracy in evaluation, nothing in training."""
        if is_train:
            return {}
        # torchmetrics takes seconds to import, and training alone does not need it.
        from torchmetrics.classification import MulticlassAccuracy

        return {"MulticlassAccuracy": MulticlassAccuracy(self.num_classes, average="micro")}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        """Add one batch to `metric`."""
        _, targets = _inputs_and_targets(batch)
        metric.update(outputs, targets)


def _inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(f"a batch must be a pair (inputs, targets), got a {type(batch).__name__}{size}")
    return batch[0], batch[1]
