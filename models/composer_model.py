"""The base class of models that write their own loss and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torchmetrics import Metric


class ComposerModel(nn.Module):
    """A model with the methods that the Trainer calls.

    .. code-block:: python

        class Regression(ComposerModel):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(8, 1)

            def forward(self, batch):
                return self.layer(batch[0])

            def loss(self, outputs, batch):
                return F.mse_loss(outputs, batch[1])

    The Trainer takes any ``nn.Module`` with these methods; this class has the defaults of those that are optional.

    Attributes:
        logger: The `Logger` of the Trainer, which sets it; None before. Copies and pickles of the model have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logger: Any = None

    def forward(self, batch: Any) -> Any:
        """The outputs for a batch of the dataloader, which is to be unpacked."""
        raise NotImplementedError(f"{type(self).__name__} must have a method forward(batch)")

    def loss(self, outputs: Any, batch: Any) -> Any:
        """The mean loss over the batch: a tensor, or a tuple or dictionary of the parts of which it is the sum."""
        raise NotImplementedError(f"{type(self).__name__} must have a method loss(outputs, batch)")

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        """The outputs in evaluation, by default those of `forward`. If it is overridden, evaluation has no loss.

        Args:
            batch: A batch of the dataloader.
            outputs: The outputs of `forward`, if they are known already.
        """
        return self(batch) if outputs is None else outputs

    eval_forward.is_default = True  # type: ignore[attr-defined]  # the Trainer then evaluates the loss, too

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """The metrics by name, by default none.

        Args:
            is_train: Whether they are those of training or those of evaluation.
        """
        return {}

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        """Add a batch to a metric of `get_metrics`."""
        raise NotImplementedError(
            f"{type(self).__name__} has metrics and must have update_metric(batch, outputs, metric)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logger": None}
