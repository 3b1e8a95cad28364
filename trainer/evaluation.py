"""Evaluation: the mean loss and the metrics over all samples of all ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from ..engine import Engine, Evaluator, Event
from . import distributed
from .data.batches import read_batches
from .data.reader import EpochReader
from .distributed.parallelism import reshard
from .loss import LossParts
from .metrics import check_metrics, flatten
from .precision import Precision, autocast
from .weights import check_same_weights


def evaluate(engine: Engine, readers: Sequence[tuple[Evaluator, EpochReader]], precision: Precision) -> None:
    """Evaluate the model on every set of evaluation data, with all EVAL events.

    Every sample counts once, for any number of ranks. Results are stored in ``state.eval_metrics`` (floats) and
    ``state.eval_tensors`` (tensors with more than one element). Metrics are reset first, so a model may return the
    same objects each time. If the model has ``eval_forward(batch)``, it is called instead of ``forward`` and no loss is
    computed, as in Composer.

    Args:
        engine: Runs the events.
        readers: Each set of data with its reader.
        precision: Dtype of the forward pass.

    Raises:
        ValueError: If a set has no batch.
        TypeError: If a metric is not a torchmetrics one on several ranks, and cannot be reduced over them.
        RuntimeError: If the weights differ between ranks that hold copies of them.
    """
    state = engine.state
    check_same_weights(state.model, state.timestamp.batch)
    distributed.copy_from_rank_zero(state.model.buffers())  # BatchNorm statistics differ between ranks
    before = state.batch, state.batch_num_samples, state.global_batch_num_samples
    label_before, dataloader_before = state.dataloader_label, state.eval_dataloader
    state.eval_metrics, state.eval_tensors = {}, {}
    with evaluation_mode(state.model), torch.no_grad():
        engine.run_event(Event.EVAL_BEFORE_ALL)
        for evaluator, reader in readers:
            state.dataloader_label, state.eval_dataloader = evaluator.label, evaluator.dataloader
            _evaluate_set(engine, evaluator, reader, precision)
        state.evaluated_at = state.timestamp.batch.value
        state.dataloader_label, state.eval_dataloader = label_before, dataloader_before
        engine.run_event(Event.EVAL_AFTER_ALL)
    state.batch, state.batch_num_samples, state.global_batch_num_samples = before


def check_metric_names(model: Any, evaluators: Sequence[Evaluator]) -> None:
    """Check that the model has the metrics that evaluators select.

    Raises:
        ValueError: If a name selects no metric.
    """
    for evaluator in evaluators:
        if evaluator.metric_names is not None:
            evaluator.select(_metrics_of(model))


def has_own_eval_forward(model: Any) -> bool:
    """Whether the model has an ``eval_forward`` other than the one that `ComposerModel` has by default."""
    method = getattr(model, "eval_forward", None)
    return callable(method) and not getattr(method, "is_default", False)


def _evaluate_set(engine: Engine, evaluator: Evaluator, reader: EpochReader, precision: Precision) -> None:
    state, run_event = engine.state, engine.run_event
    model: Any = state.model
    metrics = _prepare_metrics(model, evaluator, state.device)
    has_own_forward = has_own_eval_forward(model)
    forward = model.eval_forward if has_own_forward else model
    loss, parts, count = torch.zeros((), device=state.device), LossParts(), 0
    run_event(Event.EVAL_START)
    distributed.copy_from_rank_zero(model.buffers())  # again: an algorithm may have replaced them at EVAL_START
    batches = read_batches(engine, reader, Event.EVAL_BEFORE_DATALOADER, Event.EVAL_AFTER_DATALOADER)
    for _ in islice(batches, state.eval_subset_num_batches):
        run_event(Event.EVAL_BATCH_START)
        with autocast(precision, state.device):
            run_event(Event.EVAL_BEFORE_FORWARD)
            state.outputs = forward(state.batch)
            run_event(Event.EVAL_AFTER_FORWARD)
            if not has_own_forward:
                rows = state.batch_num_samples
                loss += parts.add(model.loss(state.outputs, state.batch), rows) * rows
        count += state.batch_num_samples
        for metric in metrics.values():
            model.update_metric(state.batch, state.outputs, metric)
        run_event(Event.EVAL_BATCH_END)
    if count == 0:
        raise ValueError("eval_dataloader must yield at least one batch, it yielded none")
    numbers, tensors = {}, {}
    total, samples, *sums = distributed.sum_over_ranks([float(loss), count, *map(float, parts.sums.values())])
    if not has_own_forward:
        for name, total_of_part in zip(["total", *parts.sums], [total, *sums], strict=True):
            numbers[f"loss/{evaluator.label}/{name}"] = total_of_part / samples
    for name, metric in metrics.items():
        for full_name, value in flatten(f"metrics/{evaluator.label}/{name}", metric.compute()):
            if value.numel() == 1:
                numbers[full_name] = float(value)
            else:
                tensors[full_name] = value.detach().cpu()
    # Stoppers and checkpoints depend on these numbers, so all ranks must have exactly the same.
    numbers, tensors = distributed.from_rank_zero((numbers, tensors))
    state.eval_metrics.update(numbers)
    state.eval_tensors.update(tensors)
    engine.logger.log_metrics(numbers)
    reshard(model)  # so that parameters are sharded at EVAL_END as at EVAL_START
    run_event(Event.EVAL_END)


def _prepare_metrics(model: Any, evaluator: Evaluator, device: torch.device) -> dict[str, Any]:
    metrics = _metrics_of(model)
    metrics = {name: metrics[name] for name in evaluator.select(metrics)}
    check_metrics(metrics)
    metrics = {name: metric.to(device) for name, metric in metrics.items()}
    for metric in metrics.values():
        if hasattr(metric, "reset"):
            metric.reset()
    return metrics


def _metrics_of(model: Any) -> dict[str, Any]:
    return dict(model.get_metrics(is_train=False)) if hasattr(model, "get_metrics") else {}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and restore the mode of each afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
