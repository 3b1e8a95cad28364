"""The training metrics of a model, which are logged at the end of each epoch."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ..engine import Callback, Logger, State
from . import distributed
from .data.batches import detach
from .metrics import check_metrics, flatten, is_torchmetric


class TrainMetrics(Callback):
    """Computes the training metrics of a model, those of ``get_metrics(is_train=True)``, over each epoch.

    They are logged at its end as ``metrics/train/NAME``, and kept in `State.train_metrics`. They see each microbatch
    with its outputs after the loss, when algorithms such as `LabelSmoothing` and `MixUp` have restored the targets; of
    a step that is computed at other weights, too, those of the first pass. An epoch that was resumed in its middle
    includes what came before its checkpoint, except for metrics that are not of torchmetrics: they are not logged for
    that epoch.

    Args:
        metrics: The metrics by name, which are copied.
        device: Their device.

    Raises:
        TypeError: If there are several ranks and a metric is no torchmetrics one, which could be reduced over them.
    """

    def __init__(self, metrics: Mapping[str, Any], device: torch.device) -> None:
        check_metrics(metrics)
        # Copies, as an evaluation resets the metrics that the model gives for it, which may be the same objects.
        self._metrics = {name: deepcopy(metric).to(device) for name, metric in metrics.items()}
        self._whole: set[str] = set()  # those that have seen the epoch from its start
        self._pairs: list[tuple[Any, Any]] = []  # of the microbatches of the step
        self._is_complete = False  # whether they are all of its microbatches

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Reset all metrics."""
        self._whole = set(self._metrics)
        for metric in self._metrics.values():
            if hasattr(metric, "reset"):
                metric.reset()

    def before_backward(self, state: State, logger: Logger) -> None:
        """Keep the microbatch and its outputs."""
        if self._is_complete:  # a pass at other weights, see `State.recompute_gradients`
            return
        if state.microbatch_start == 0:  # also where memory ran out before
            self._pairs = []
        self._pairs.append((state.batch, detach(state.outputs)))
        self._is_complete = state.microbatch_start + state.microbatch_num_samples == state.batch_num_samples

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Add all microbatches to the metrics."""
        model: Any = state.model
        for batch, outputs in self._pairs:
            for metric in self._metrics.values():
                model.update_metric(batch, outputs, metric)
        self._pairs, self._is_complete = [], False

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Compute and log them."""
        with warnings.catch_warnings():
            # A run that was resumed at the end of an epoch has the samples from its checkpoint.
            warnings.filterwarnings("ignore", r"The ``compute`` method of metric .* was called before the ``update``")
            results = {
                full_name: value.detach().cpu()
                for name, metric in self._metrics.items()
                if name in self._whole
                for full_name, value in flatten(f"metrics/train/{name}", metric.compute())
            }
        state.train_metrics = {name: float(value) if value.numel() == 1 else value for name, value in results.items()}
        logger.log_metrics({name: value for name, value in state.train_metrics.items() if isinstance(value, float)})

    def state_dict(self) -> dict[str, Any]:
        """The states of the metrics, with the samples of all ranks."""
        states = {}
        for name, metric in self._metrics.items():
            if name not in self._whole or not is_torchmetric(metric):
                continue
            with metric.sync_context(should_unsync=True):
                states[name] = {key: _copied(value) for key, value in metric.metric_state.items()}
        return {"metrics": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the states of `state_dict`, which belong to rank 0 from now on."""
        for name, values in state["metrics"].items():
            metric = self._metrics.get(name)
            if metric is None or not is_torchmetric(metric):
                continue
            if values.keys() != metric.metric_state.keys():
                raise ValueError(f"the state of the training metric {name!r} must have {list(metric.metric_state)}")
            self._whole.add(name)
            if distributed.rank() == 0:
                for key, value in values.items():
                    setattr(metric, key, _on(metric.device, value))


def find_train_metrics(model: nn.Module, device: torch.device) -> TrainMetrics | None:
    """The callback that computes the training metrics of a model; None if it has none."""
    metrics = model.get_metrics(is_train=True) if hasattr(model, "get_metrics") else {}  # type: ignore[operator]
    return TrainMetrics(metrics, device) if metrics else None


def _copied(value: Any) -> Any:
    """A tensor or a list of them, on the CPU."""
    return [item.detach().cpu().clone() for item in value] if isinstance(value, list) else value.detach().cpu().clone()


def _on(device: torch.device, value: Any) -> Any:
    return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)
