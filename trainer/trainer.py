"""The Trainer: it turns the loop and tells the engine of every event. `Event` shows the loop as a text."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..engine import Algorithm, Callback, Engine, Event, Logger, LoggerDestination, State, Time, TimeUnit
from . import batches, checks
from .file_logger import FileLogger
from .precision import Precision, autocast, check_precision, grad_scaler
from .progress_bar import ProgressBar
from .reproducibility import generator_of_epoch, seed_all

_log = logging.getLogger(__name__)


class Trainer:
    """Trains a model and evaluates it, and lets algorithms and callbacks act at every `Event`.

    The model is any ``nn.Module`` with ``forward(batch)`` and ``loss(outputs, batch)``, the mean over
    the batch. Evaluation metrics are optional: ``get_metrics(is_train)`` gives torchmetrics objects
    by name, ``update_metric(batch, outputs, metric)`` adds a batch to one.

    INIT runs when the Trainer is built, on the raw model. All generators (python, numpy, torch) are
    seeded then.

    Args:
        model: What to train. It is changed in place.
        train_dataloader: Yields the batches of an epoch: tensors, or tuples, lists and dictionaries
            of them, with one row per sample.
        eval_dataloader: Yields the batches of an evaluation.
        max_duration: How long to train: ``"3ep"``, ``"100ba"``, ``"6400sp"`` or a `Time`.
        algorithms: What changes training; they act in this order.
        optimizers: One or several; by default AdamW with its torch defaults, which is announced.
        schedulers: Learning rate schedulers of these optimizers.
        step_schedulers_every_batch: Step the schedulers after every batch instead of every epoch.
        callbacks: What watches training.
        loggers: Where metrics go, besides the files of a named run.
        device: ``"cpu"``, ``"gpu"`` or a torch device; by default the GPU where there is one.
        precision: ``"fp32"``, or ``"amp_bf16"`` or ``"amp_fp16"`` for automatic mixed precision.
        device_train_microbatch_size: Rows per forward and backward pass. The gradients of the
            microbatches add up to those of the whole batch, except that BatchNorm sees microbatches.
        eval_interval: How often to evaluate, in epochs or batches; by default after every epoch. The
            end of training is always evaluated.
        seed: Of all generators, from 0 to 2**32 - 1.
        deterministic_mode: Use only deterministic kernels, on CPU and GPU.
        run_name: Metrics go to ``runs/<run_name>/``; without a name there are no files.
        progress_bar: Show progress on standard error.

    Raises:
        TypeError: If an argument is of the wrong kind; the message shows the wrap for a model
            without ``loss``.
        ValueError: If an argument breaks its rule. Model and files are then unchanged.
        FileExistsError: If the run's folder holds metrics already.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataloader: Iterable[Any] | None = None,
        eval_dataloader: Iterable[Any] | None = None,
        max_duration: str | Time | None = None,
        algorithms: Algorithm | Sequence[Algorithm] = (),
        optimizers: Optimizer | Sequence[Optimizer] = (),
        schedulers: LRScheduler | Sequence[LRScheduler] = (),
        *,
        step_schedulers_every_batch: bool = False,
        callbacks: Callback | Sequence[Callback] = (),
        loggers: LoggerDestination | Sequence[LoggerDestination] = (),
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        device_train_microbatch_size: int | None = None,
        eval_interval: str | Time | None = None,
        seed: int = 0,
        deterministic_mode: bool = False,
        run_name: str | None = None,
        progress_bar: bool = True,
    ) -> None:
        check_precision(precision)
        state = State(
            model=checks.check_model(model),
            max_duration=checks.check_duration(max_duration, train_dataloader),
            train_dataloader=checks.check_dataloader(train_dataloader, "train_dataloader"),
            eval_dataloader=checks.check_dataloader(eval_dataloader, "eval_dataloader"),
            optimizers=checks.as_sequence(optimizers, Optimizer, "optimizers"),
            schedulers=checks.as_sequence(schedulers, LRScheduler, "schedulers"),
            algorithms=checks.as_sequence(algorithms, Algorithm, "algorithms"),
            callbacks=checks.as_sequence(callbacks, Callback, "callbacks"),
            device=checks.check_device(device),
            seed=checks.check_seed(seed),
        )
        checks.check_optimizers(state.optimizers, model)
        checks.check_schedulers(state.schedulers, state.optimizers)
        checks.check_steps(state.optimizers, state.schedulers)
        self._eval_interval = checks.check_interval(eval_interval, eval_dataloader)
        self._microbatch_size = checks.check_microbatch_size(device_train_microbatch_size)
        destinations = list(checks.as_sequence(loggers, LoggerDestination, "loggers"))
        if run_name is not None:
            destinations.append(FileLogger(Path("runs") / checks.check_run_name(run_name)))
        if progress_bar:
            destinations.append(ProgressBar())

        self.state = state
        self.logger = Logger(state, destinations)
        self.engine = Engine(state, self.logger)
        self._precision = precision
        self._scaler = grad_scaler(precision, state.device)
        self._step_schedulers_every_batch = step_schedulers_every_batch
        self._evaluated_at = -1
        seed_all(seed, deterministic_mode)
        self.engine.run_event(Event.INIT)
        model.to(state.device)
        checks.check_optimizers(state.optimizers, model)  # again: an algorithm may have replaced parameters
        if train_dataloader is not None and not state.optimizers:
            state.optimizers = (_default_optimizer(model),)

    def fit(self) -> None:
        """Train until `max_duration` is reached, and evaluate on the way.

        An exception closes the Trainer before it is passed on.

        Raises:
            ValueError: If there is no data to train on, or a batch is not what the model takes.
            RuntimeError: If the Trainer is closed, or has reached `max_duration` already.
        """
        if self.state.train_dataloader is None:
            raise ValueError("train_dataloader must be given to fit, got None")
        self._check_open("fit")
        if self.state.is_finished:
            raise RuntimeError(f'max_duration="{self.state.max_duration}" is reached: there is nothing left to fit')
        try:
            self._log_settings()
            self._fit()
        except BaseException as error:
            self._close_after(error)
            raise

    def eval(self) -> dict[str, float]:
        """Evaluate on `eval_dataloader`.

        Returns:
            The metrics by name.

        Raises:
            ValueError: If there is no data to evaluate on.
            RuntimeError: If the Trainer is closed.
        """
        if self.state.eval_dataloader is None:
            raise ValueError("eval_dataloader must be given to evaluate, got None")
        self._check_open("eval")
        self.engine.run_event(Event.EVAL_STANDALONE_START)
        self._evaluate()
        self.engine.run_event(Event.EVAL_STANDALONE_END)
        return self.state.eval_metrics

    def close(self) -> None:
        """Close all callbacks and loggers. The Trainer cannot fit or evaluate any more.

        Raises:
            ExceptionGroup: If some of them failed to close; the others are closed all the same.
        """
        self.engine.close()

    def _fit(self) -> None:
        state, run_event = self.state, self.engine.run_event
        if not state.model.training:
            state.model.train()  # only then: a user may have frozen a part of a model in training mode
        run_event(Event.FIT_START)
        while not state.is_finished:
            self._train_epoch()
        if state.eval_dataloader is not None and self._evaluated_at != state.timestamp.batch:
            self._evaluate()
        run_event(Event.FIT_END)

    def _train_epoch(self) -> None:
        state, run_event = self.state, self.engine.run_event
        run_event(Event.EPOCH_START)
        started, exhausted = time.perf_counter(), True
        for _ in self._batches(state.train_dataloader, Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER):
            self._train_batch()
            if self._is_due(TimeUnit.BATCH):
                self._evaluate()
            run_event(Event.BATCH_CHECKPOINT)
            if state.is_finished:
                exhausted = state.timestamp.batch_in_epoch == state.batches_per_epoch
                break
        if state.timestamp.batch_in_epoch == 0:
            raise ValueError("train_dataloader must yield at least one batch per epoch, it yielded none")
        if not exhausted:
            return
        state.timestamp = state.timestamp.to_next_epoch()
        if not self._step_schedulers_every_batch:
            self._step_schedulers()
        self.logger.log_metrics({"time/epoch": time.perf_counter() - started})
        run_event(Event.EPOCH_END)
        if self._is_due(TimeUnit.EPOCH):
            self._evaluate()
        run_event(Event.EPOCH_CHECKPOINT)

    def _train_batch(self) -> None:
        state, run_event = self.state, self.engine.run_event
        run_event(Event.BATCH_START)
        run_event(Event.BEFORE_TRAIN_BATCH)
        state.model.zero_grad(set_to_none=True)  # also the gradients that no optimizer uses
        loss = self._train_microbatches()
        self._unscale_gradients()
        run_event(Event.AFTER_TRAIN_BATCH)
        self._step_optimizers()
        lr = state.optimizers[0].param_groups[0]["lr"]
        lr = lr.clone() if isinstance(lr, Tensor) else lr  # a scheduler changes a tensor in place
        if self._step_schedulers_every_batch:
            self._step_schedulers()
        state.timestamp = state.timestamp.to_next_batch(state.batch_num_samples)
        self.logger.log_metrics({"epoch": state.timestamp.epoch, "loss/train/total": loss, "lr": lr})
        run_event(Event.BATCH_END)

    def _train_microbatches(self) -> Tensor:
        """Run forward and backward; the returned loss is the mean over the whole batch."""
        state = self.state
        batch, size, whole = state.batch, self._microbatch_size, state.batch_num_samples
        if size is None or size >= whole:
            state.microbatch_start, state.microbatch_num_samples = 0, whole
            return self._train_microbatch(batch, share=1.0)
        total = torch.zeros((), device=state.device)
        for index, microbatch in enumerate(batches.split(batch, size)):
            state.microbatch_start = index * size
            state.microbatch_num_samples = min(size, whole - state.microbatch_start)
            share = state.microbatch_num_samples / whole
            total += share * self._train_microbatch(microbatch, share)
        state.batch = batch
        return total

    def _train_microbatch(self, microbatch: Any, share: float) -> Tensor:
        state, run_event = self.state, self.engine.run_event
        model: Any = state.model
        state.batch = microbatch
        with autocast(self._precision, state.device):
            run_event(Event.BEFORE_FORWARD)
            state.outputs = model(state.batch)
            run_event(Event.AFTER_FORWARD)
            run_event(Event.BEFORE_LOSS)
            state.loss = _check_loss(model.loss(state.outputs, state.batch))
            run_event(Event.AFTER_LOSS)
        run_event(Event.BEFORE_BACKWARD)
        loss = state.loss if share == 1.0 else state.loss * share
        self._scaler.scale(loss).backward()
        run_event(Event.AFTER_BACKWARD)
        return state.loss.detach()

    def _evaluate(self) -> None:
        state, run_event = self.state, self.engine.run_event
        model: Any = state.model
        metrics = model.get_metrics(is_train=False) if hasattr(model, "get_metrics") else {}
        metrics = {name: metric.to(state.device) for name, metric in metrics.items()}
        loss, count = torch.zeros((), device=state.device), 0
        before = state.batch, state.batch_num_samples
        with _evaluation_mode(model), torch.no_grad():
            run_event(Event.EVAL_START)
            events = Event.EVAL_BEFORE_DATALOADER, Event.EVAL_AFTER_DATALOADER
            for _ in self._batches(state.eval_dataloader, *events):
                run_event(Event.EVAL_BATCH_START)
                with autocast(self._precision, state.device):
                    run_event(Event.EVAL_BEFORE_FORWARD)
                    state.outputs = model(state.batch)
                    run_event(Event.EVAL_AFTER_FORWARD)
                    loss += _check_loss(model.loss(state.outputs, state.batch)) * state.batch_num_samples
                count += state.batch_num_samples
                for metric in metrics.values():
                    model.update_metric(state.batch, state.outputs, metric)
                run_event(Event.EVAL_BATCH_END)
            if count == 0:
                raise ValueError("eval_dataloader must yield at least one batch, it yielded none")
            results = {f"metrics/eval/{name}": float(metric.compute()) for name, metric in metrics.items()}
            state.eval_metrics = {"loss/eval/total": float(loss) / count, **results}
            self._evaluated_at = state.timestamp.batch
            self.logger.log_metrics(state.eval_metrics)
            run_event(Event.EVAL_END)
        state.batch, state.batch_num_samples = before

    def _batches(self, dataloader: Iterable[Any] | None, before: Event, after: Event) -> Iterator[Any]:
        """Yield each batch of a dataloader on the device, with the event before and after it is fetched."""
        assert dataloader is not None, "fit and eval have checked it"
        state, iterator = self.state, None
        while True:
            self.engine.run_event(before)
            if iterator is None:
                # A dataloader shuffles when its first batch is fetched, by torch's global generator. Seeded here, the
                # order depends on seed and epoch alone, and not on what the model or an evaluation has drawn.
                with generator_of_epoch(state.seed, state.timestamp.epoch):
                    iterator = iter(dataloader)
                    batch = next(iterator, _NO_BATCH)
            else:
                batch = next(iterator, _NO_BATCH)
            if batch is _NO_BATCH:
                return
            state.batch_num_samples = batches.num_samples(batch)
            state.batch = batches.move(batch, state.device)
            self.engine.run_event(after)
            yield state.batch

    def _is_due(self, unit: TimeUnit) -> bool:
        state, interval = self.state, self._eval_interval
        if state.eval_dataloader is None or interval.unit is not unit:
            return False
        return state.timestamp.get(unit).value % interval.value == 0

    def _unscale_gradients(self) -> None:
        if self._scaler.is_enabled():
            for optimizer in filter(_has_gradient, self.state.optimizers):
                self._scaler.unscale_(optimizer)

    def _step_optimizers(self) -> None:
        for optimizer in self.state.optimizers:
            # The loss scaler refuses an optimizer that got no gradient at all, as dropped blocks may leave it.
            if not self._scaler.is_enabled() or _has_gradient(optimizer):
                self._scaler.step(optimizer)
        self._scaler.update()

    def _step_schedulers(self) -> None:
        for scheduler in self.state.schedulers:
            scheduler.step()

    def _log_settings(self) -> None:
        state = self.state
        self.logger.log_hyperparameters(
            {
                "model": type(state.model).__name__,
                "max_duration": str(state.max_duration),
                "algorithms": [repr(algorithm) for algorithm in state.algorithms],
                "optimizers": [_describe(optimizer) for optimizer in state.optimizers],
                "schedulers": [type(scheduler).__name__ for scheduler in state.schedulers],
                "device": str(state.device),
                "precision": self._precision,
                "device_train_microbatch_size": self._microbatch_size,
                "seed": state.seed,
                "torch": str(torch.__version__),
            }
        )

    def _check_open(self, action: str) -> None:
        if self.engine.is_closed:
            raise RuntimeError(f"the Trainer is closed and cannot {action} any more: build a new one")

    def _close_after(self, error: BaseException) -> None:
        try:
            self.close()
        except ExceptionGroup as group:
            error.add_note(f"while closing, too: {group!r}")


_NO_BATCH = object()


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


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _check_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"model.loss must return a tensor without dimensions, the mean over the batch; got {what}")
    return loss


def _default_optimizer(model: nn.Module) -> Optimizer:
    optimizer = AdamW(model.parameters())
    settings = optimizer.defaults
    _log.warning(
        "no optimizers were given: training with AdamW(lr=%g, weight_decay=%g)",
        settings["lr"],
        settings["weight_decay"],
    )
    return optimizer


def _describe(optimizer: Optimizer) -> dict[str, Any]:
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return {"name": type(optimizer).__name__, "groups": groups}
