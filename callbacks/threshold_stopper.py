"""Ends the training when a metric reaches a threshold."""

from ..engine import State
from ..engine.checks import check_number
from .metric_stopper import Comparison, MetricStopper


class ThresholdStopper(MetricStopper):
    """Ends the training when a metric is better than a threshold.

    .. code-block:: python

        ThresholdStopper("accuracy", "eval", 0.9)

    Args:
        monitor: Name of the metric in ``model.get_metrics(is_train=False)``, or ``"loss"``.
        dataloader_label: Name of the evaluation data; ``"eval"`` if there is only one set.
        threshold: The value that the metric must be better than.
        comp: ``"less"`` (or ``"lt"``), ``"greater"`` (``"gt"``), or a function of the value and the threshold, as
            tensors, that tells whether training ends. By default less for names with "loss", "error" or
            "perplexity", greater for all others.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is invalid. An unknown metric is an error when training starts.
    """

    def __init__(
        self, monitor: str, dataloader_label: str, threshold: float, *, comp: str | Comparison | None = None
    ) -> None:
        super().__init__(monitor, dataloader_label, comp)
        self.threshold = check_number("threshold", threshold)

    def should_stop(self, value: float, state: State) -> bool:
        """Whether the metric is better than the threshold."""
        return self.is_better(value, self.threshold)
