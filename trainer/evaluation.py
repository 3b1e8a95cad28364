"""Evaluation: the mean loss and the metrics over all samples of all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..engine import Engine, Event
from . import distributed
from .checks import check_loss
from .data.batches import read_batches
from .data.reader import EpochReader
from .precision import Precision, autocast
from .weights import check_same_weights


def evaluate(engine: Engine, reader: EpochReader, precision: Precision) -> None:
    """Evaluate the model in the engine's state, with all events on the way.

    Every sample counts once, on however many ranks. ``state.eval_metrics`` then has the results.

    Args:
        engine: Told of every event.
        reader: Of the evaluation data.
        precision: Dtype of the forward pass.

    Raises:
        ValueError: If there is no batch.
        TypeError: If there are several ranks and a metric is no torchmetrics one, which could be reduced over them.
        RuntimeError: If the weights differ between ranks that hold copies of them.
    """
    state, run_event = engine.state, engine.run_event
    model: Any = state.model
    check_same_weights(model, state.timestamp.batch)
    metrics = _metrics(model, state.device)
    distributed.copy_from_rank_zero(model.buffers())  # each rank's BatchNorm has seen its own rows
    loss, count = torch.zeros((), device=state.device), 0
    before = state.batch, state.batch_num_samples, state.global_batch_num_samples, state.dataloader_label
    state.dataloader_label = "eval"
    with _evaluation_mode(model), torch.no_grad():
        run_event(Event.EVAL_START)
        for _ in read_batches(engine, reader, Event.EVAL_BEFORE_DATALOADER, Event.EVAL_AFTER_DATALOADER):
            run_event(Event.EVAL_BATCH_START)
            with autocast(precision, state.device):
                run_event(Event.EVAL_BEFORE_FORWARD)
                state.outputs = model(state.batch)
                run_event(Event.EVAL_AFTER_FORWARD)
                loss += check_loss(model.loss(state.outputs, state.batch)) * state.batch_num_samples
            count += state.batch_num_samples
            for metric in metrics.values():
                model.update_metric(state.batch, state.outputs, metric)
            run_event(Event.EVAL_BATCH_END)
        if count == 0:
            raise ValueError("eval_dataloader must yield at least one batch, it yielded none")
        total, samples = distributed.sum_over_ranks([float(loss), count])
        results = {f"metrics/eval/{name}": float(metric.compute()) for name, metric in metrics.items()}
        # Ranks act on these numbers, so they must be the same to the last bit.
        state.eval_metrics = distributed.from_rank_zero({"loss/eval/total": total / samples, **results})
        state.evaluated_at = state.timestamp.batch.value
        engine.logger.log_metrics(state.eval_metrics)
        run_event(Event.EVAL_END)
    state.batch, state.batch_num_samples, state.global_batch_num_samples, state.dataloader_label = before


def _metrics(model: Any, device: torch.device) -> dict[str, Any]:
    metrics = model.get_metrics(is_train=False) if hasattr(model, "get_metrics") else {}
    if metrics and distributed.world_size() > 1:
        from torchmetrics import Metric  # takes seconds to import

        for name, metric in metrics.items():
            if not isinstance(metric, Metric):
                raise TypeError(
                    f"metrics must be torchmetrics.Metric on several ranks, {name} is a {type(metric).__name__}"
                )
    return {name: metric.to(device) for name, metric in metrics.items()}


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards each back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
