"""Base class of the callbacks that end training because of a metric."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..engine import Callback, Logger, State

Comparison = Callable[[Any, Any], Any]

_COMPARISONS: dict[str, Comparison] = {
    "less": torch.less,
    "lt": torch.less,
    "greater": torch.greater,
    "gt": torch.greater,
}
_LOWER_IS_BETTER = ("loss", "error", "perplexity")


class MetricStopper(Callback):
    """Checks one metric after each evaluation, or after each epoch of training, and may end the training.

    Args:
        monitor: Name of the metric in ``model.get_metrics``, or ``"loss"``.
        dataloader_label: Name of the evaluation data, or ``"train"`` for the mean over an epoch of training.
        comp: ``"less"`` (or ``"lt"``), ``"greater"`` (``"gt"``), or a function of a value and the one that it is
            compared with, as tensors, that tells whether the first is better. By default less for names with
            "loss", "error" or "perplexity", greater for all others.
    """

    def __init__(self, monitor: str, dataloader_label: str, comp: str | Comparison | None) -> None:
        for name, value in (("monitor", monitor), ("dataloader_label", dataloader_label)):
            if not isinstance(value, str) or not value:
                raise TypeError(f"{name} must be a name, got {value!r}")
        self.monitor = monitor
        self.dataloader_label = dataloader_label
        self.comp = _find_comparison(comp, monitor)
        self._has_stopped = False

    @property
    def metric(self) -> str:
        """The name under which the metric is logged."""
        if self.monitor == "loss":
            return f"loss/{self.dataloader_label}/total"
        return f"metrics/{self.dataloader_label}/{self.monitor}"

    def should_stop(self, value: float, state: State) -> bool:
        """Whether the training is to end.

        Args:
            value: The latest value of the metric.
            state: The state.
        """
        raise NotImplementedError

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check that the metric exists, and stop again if the resumed run had been stopped.

        Raises:
            ValueError: If the metric or the evaluation data does not exist.
        """
        known = ["loss", *self._known_metrics(state)]
        if self.monitor not in known:
            raise ValueError(f"monitor must be one of {', '.join(known)}, got {self.monitor!r}")
        if self._has_stopped:
            state.stop_training()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Check the metric, and end the training if it asks for that."""
        if state.dataloader_label == self.dataloader_label and self.should_stop(self._value(state), state):
            self._has_stopped = True
            state.stop_training()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Check a metric of training."""
        if self.dataloader_label == "train" and self.should_stop(self._train_value(state), state):
            self._has_stopped = True
            state.stop_training()

    def is_better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`, according to `comp`."""
        return bool(self.comp(torch.tensor(value, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)))

    def state_dict(self) -> dict[str, Any]:
        """Whether this callback has ended the training."""
        return {"has_stopped": self._has_stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._has_stopped = bool(state["has_stopped"])

    def _known_metrics(self, state: State) -> list[str]:
        if self.dataloader_label == "train":
            return _metrics_of(state.model, is_train=True)
        if not state.evaluators:
            raise ValueError(f"{type(self).__name__} needs an eval_dataloader, got None")
        evaluators = {evaluator.label: evaluator for evaluator in state.evaluators}
        if self.dataloader_label not in evaluators:
            labels = ", ".join([*evaluators, "train"])
            raise ValueError(f"dataloader_label must be one of {labels}, got {self.dataloader_label!r}")
        return evaluators[self.dataloader_label].select(_metrics_of(state.model, is_train=False))

    def _train_value(self, state: State) -> float:
        if self.monitor == "loss":
            return math.nan if state.epoch_loss.mean is None else state.epoch_loss.mean
        value = state.train_metrics.get(self.metric)
        if not isinstance(value, float):
            raise ValueError(f"monitor must be a metric that is a number, got {self.metric!r}")
        return value

    def _value(self, state: State) -> float:
        if self.metric not in state.eval_metrics:
            known = ", ".join(state.eval_metrics)
            raise ValueError(f"monitor must be a metric that is a number, one of {known}, got {self.metric!r}")
        return state.eval_metrics[self.metric]


def _metrics_of(model: Any, *, is_train: bool) -> list[str]:
    return list(model.get_metrics(is_train=is_train)) if hasattr(model, "get_metrics") else []


def _find_comparison(comp: str | Comparison | None, monitor: str) -> Comparison:
    if comp is None:
        return torch.less if any(word in monitor.lower() for word in _LOWER_IS_BETTER) else torch.greater
    if callable(comp):
        return comp
    if comp not in _COMPARISONS:
        raise ValueError(f"comp must be a function or one of {', '.join(_COMPARISONS)}, got {comp!r}")
    return _COMPARISONS[comp]
