"""Ends the training when a metric reaches a threshold."""

from ..engine import Logger, State
from ..engine.checks import check_number
from .metric_stopper import Comparison, MetricStopper


class ThresholdStopper(MetricStopper):
    """Ends the training when a metric is better than a threshold.

    .. code-block:: python

        ThresholdStopper("accuracy", "eval", 0.9)

    Args:
        monitor: Name of the metric in ``model.get_metrics``, or ``"loss"``.
        dataloader_label: Name of the evaluation data, ``"eval"`` if there is only one set; ``"train"`` for the mean
            over each epoch of training.
        threshold: The value that the metric must be better than.
        comp: ``"less"`` (or ``"lt"``), ``"greater"`` (``"gt"``), or a function of the value and the threshold, as
            tensors, that tells whether training ends. By default less for names with "loss", "error" or
            "perplexity", greater for all others.
        stop_on_batch: Compare the loss of every batch that is trained on, which waits for the device. Only for the
            monitor ``"loss"`` of ``"train"``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is invalid. An unknown metric is an error when training starts.
    """

    def __init__(
        self,
        monitor: str,
        dataloader_label: str,
        threshold: float,
        *,
        comp: str | Comparison | None = None,
        stop_on_batch: bool = False,
    ) -> None:
        super().__init__(monitor, dataloader_label, comp)
        self.threshold = check_number("threshold", threshold)
        if stop_on_batch and (monitor, dataloader_label) != ("loss", "train"):
            raise ValueError(
                f'stop_on_batch must be False for other metrics than the "loss" of "train", got {monitor!r} of '
                f"{dataloader_label!r}"
            )
        self.stop_on_batch = stop_on_batch

    def batch_end(self, state: State, logger: Logger) -> None:
        """Compare the loss of the batch, if asked to."""
        if self.stop_on_batch and self.should_stop(float(state.epoch_loss.latest), state):
            self._has_stopped = True
            state.stop_training()

    def should_stop(self, value: float, state: State) -> bool:
        """Whether the metric is better than the threshold."""
        return self.is_better(value, self.threshold)
