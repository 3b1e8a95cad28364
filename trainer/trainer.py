"""The Trainer: it turns the loop and tells the engine of every event. `Event` shows the loop as a text."""

import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..engine import Algorithm, Callback, Evaluator, Event, LoggerDestination, State, Time, Timestamp
from . import checks, distributed
from .assembly import assemble, default_optimizer, open_eval_reader, open_predict_reader, open_train_reader
from .checkpoint.contents import restore_generators
from .checkpoint.saver import save_after, save_checkpoint
from .data.batches import read_batches
from .distributed.parallelism import Parallelism
from .eval_schedule import EvalSchedule
from .evaluation import evaluate
from .precision import Precision
from .prediction import predict
from .settings import check_same_on_all_ranks, describe_dataloader
from .signals import SignalListener, TrainingInterrupted


class Trainer:
    """Trains and evaluates a model, and lets algorithms and callbacks act at every `Event`.

    The model is any ``nn.Module`` with ``forward(batch)`` and ``loss(outputs, batch)``, the mean over
    the batch, or a tuple or dictionary of the parts of which it is the sum. Evaluation metrics are
    optional: ``get_metrics(is_train)`` gives torchmetrics objects by name,
    ``update_metric(batch, outputs, metric)`` adds a batch to one.

    INIT runs when the Trainer is built, on the raw model. All generators (python, numpy, torch) are
    seeded then. Each batch that is read is a function of the seed, the epoch and its place in it,
    whatever the number of loader workers and whatever else draws random numbers.

    Under torchrun the processes train together: every batch is divided among them, so the same
    settings give the same training on any number of them (BatchNorm sees the rows of its rank, unless
    `sync_batchnorm` is set). Only rank 0 logs and saves.

    Args:
        model: What to train. It is changed in place.
        train_dataloader: Yields the batches of an epoch: tensors, or tuples, lists and dictionaries
            of them, with one row per sample. Its batch size is that of all ranks together.
        eval_dataloader: Yields the batches of an evaluation. For several sets of data a dictionary of their names and
            dataloaders, or a list of `Evaluator` objects.
        max_duration: How long to train: ``"3ep"``, ``"100ba"``, ``"6400sp"`` or a `Time`; an int counts epochs.
        algorithms: What changes training; they act in this order.
        optimizers: One or several; by default AdamW with its torch defaults, which is announced.
        schedulers: Learning rate schedulers of these optimizers, of torch; or functions of the `State` such as those of
            ``etude.optim``, which give a factor of the initial learning rates before every step.
        step_schedulers_every_batch: Step the schedulers of torch after every batch instead of every epoch.
        callbacks: What watches training.
        loggers: Where metrics go, besides the files of a named run.
        device: ``"cpu"``, ``"gpu"`` or a torch device; by default the GPU where there is one.
        precision: ``"fp32"``, or ``"amp_bf16"`` or ``"amp_fp16"`` for automatic mixed precision.
        device_train_microbatch_size: Rows per forward and backward pass on a device. The gradients of
            the microbatches add up to those of the whole batch, except that BatchNorm sees
            microbatches. ``"auto"`` begins with the whole batch; a step that runs out of memory on any
            rank is repeated in microbatches of half the size, with the same drop plan.
        eval_interval: How often to evaluate, in any unit but wall-clock time; an int counts epochs; by default after
            every epoch. The end of training is always evaluated. 0 never evaluates.
        train_subset_num_batches: End every epoch after so many batches; None or -1 reads all.
        eval_subset_num_batches: End every evaluation after so many batches; None or -1 reads all.
        seed: Of all generators, from 0 to 2**32 - 1.
        deterministic_mode: Use only deterministic kernels, on CPU and GPU.
        run_name: Metrics go to ``runs/<run_name>/``; without a name there are no files.
        progress_bar: Show progress on standard error.
        save_folder: Checkpoints go there, as a `CheckpointSaver` among the callbacks writes them, which has
            more settings. SIGTERM and SIGINT then finish the running step, save, and end the training
            with `TrainingInterrupted`.
        save_interval: How often, in any unit: ``"1ep"`` (default), ``"500ba"``, ``"0.1dur"``, ``"10min"``.
        save_num_checkpoints_to_keep: How many of the newest checkpoints are kept; -1 keeps all.
        load_path: A checkpoint, or a folder of them, to resume from.
        load_weights_only: Take only the weights from `load_path`, for a new training.
        autoresume: Resume from the newest good checkpoint in `save_folder` where there is one.
        max_nonfinite_steps: How many steps in a row may be skipped as loss or gradients were not finite.
        parallelism: Under torchrun, ``"ddp"`` copies the model to every rank; ``"fsdp"`` shards it and its optimizers.
        find_unused_parameters: Whether ranks may use different parameters, as in data-dependent branches of a model.
        sync_batchnorm: Let BatchNorm see the rows of all ranks.
        dist_timeout: Seconds after which a rank that does not answer is given up; more than a save takes.

    Raises:
        TypeError: If an argument is of the wrong kind; the message shows the wrap for a model
            without ``loss``.
        ValueError: If an argument breaks its rule. Model and files are then unchanged.
        FileExistsError: If the run's folder holds metrics already, and nothing is resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataloader: Iterable[Any] | None = None,
        eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | Evaluator | Sequence[Evaluator] | None = None,
        max_duration: str | int | Time | None = None,
        algorithms: Algorithm | Sequence[Algorithm] = (),
        optimizers: Optimizer | Sequence[Optimizer] = (),
        schedulers: LRScheduler | Callable[[State], float] | Sequence[LRScheduler | Callable[[State], float]] = (),
        *,
        step_schedulers_every_batch: bool = False,
        callbacks: Callback | Sequence[Callback] = (),
        loggers: LoggerDestination | Sequence[LoggerDestination] = (),
        device: str | torch.device | None = None,
        precision: Precision = "fp32",
        device_train_microbatch_size: int | Literal["auto"] | None = None,
        eval_interval: str | int | Time | None = None,
        train_subset_num_batches: int | None = None,
        eval_subset_num_batches: int | None = None,
        seed: int = 0,
        deterministic_mode: bool = False,
        run_name: str | None = None,
        progress_bar: bool = True,
        save_folder: str | Path | None = None,
        save_interval: str | Time | None = None,
        save_num_checkpoints_to_keep: int | None = None,
        load_path: str | Path | None = None,
        load_weights_only: bool = False,
        autoresume: bool = False,
        max_nonfinite_steps: int = 0,
        parallelism: Parallelism = "ddp",
        find_unused_parameters: bool = False,
        sync_batchnorm: bool = False,
        dist_timeout: float = 300.0,
    ) -> None:
        parts = assemble({name: value for name, value in locals().items() if name != "self"})
        self.state = parts.engine.state
        self.engine = parts.engine
        self.logger = parts.engine.logger
        self._options = parts.options
        self._saver = parts.saver
        self._step = parts.train_step
        self._train_reader = parts.train_reader
        self._eval_readers = parts.eval_readers
        self._resumed = parts.resumed
        self._eval_schedule = EvalSchedule(self.state, parts.options.eval_interval)
        self._unfinished: Event | None = None  # what is still to come of a step or an epoch
        self._batch = self.state.timestamp.batch  # at the beginning of the step

    def fit(
        self,
        duration: str | int | Time | None = None,
        train_dataloader: Iterable[Any] | None = None,
        *,
        reset_time: bool = False,
    ) -> None:
        """Train until `max_duration` is reached, and evaluate on the way.

        An exception closes the Trainer before it is passed on; with a `CheckpointSaver`, in a single process, what the
        finished steps have reached is saved first. A run that was resumed at its end does nothing but what is left of
        the end: an evaluation that is due, and FIT_END.

        Args:
            duration: Train for so long from here on, whatever `max_duration` was. An int counts epochs.
            train_dataloader: Replaces that of the Trainer; a new epoch begins.
            reset_time: Count epochs, batches and samples from 0 again.

        Raises:
            ValueError: If there is no data to train on, or a batch is not what the model takes.
            RuntimeError: If the Trainer is closed, or has reached `max_duration` already.
            FloatingPointError: If loss or gradients of too many steps in a row were not finite.
            TrainingInterrupted: If SIGTERM or SIGINT came on any rank, and there are checkpoints to save;
                a SystemExit with the code 128 + number of the signal.
            RankLostError: If another rank does not answer.
        """
        self._check_open("fit")
        self._prepare_fit(duration, train_dataloader, reset_time)
        try:
            self.logger.log_hyperparameters(self.state.settings)
            with SignalListener() if self._saver is not None else nullcontext() as listener:
                self._fit(listener)
        except BaseException as error:
            if self._saver is not None and self._is_between_steps():
                save_after(error, self._saver, self.state, self.logger)
            self._close_after(error)
            raise

    def eval(
        self,
        eval_dataloader: Iterable[Any] | Mapping[str, Iterable[Any]] | Evaluator | Sequence[Evaluator] | None = None,
        subset_num_batches: int | None = None,
    ) -> dict[str, float | Tensor]:
        """Evaluate the model.

        Args:
            eval_dataloader: The data, in the forms that the Trainer takes; by default that of the Trainer.
            subset_num_batches: How many batches to read; by default `eval_subset_num_batches`, -1 for all.

        Returns:
            The loss and the metrics by name: numbers, and tensors on the CPU for metrics that are no numbers.

        Raises:
            ValueError: If there is no data to evaluate on.
            RuntimeError: If the Trainer is closed.
        """
        self._check_open("eval")
        state, readers = self.state, self._eval_readers
        if eval_dataloader is not None:
            evaluators = checks.as_evaluators("eval_dataloader", eval_dataloader)
            readers = [(evaluator, open_eval_reader(state, evaluator)) for evaluator in evaluators]
        if not readers:
            raise ValueError("eval_dataloader must be given to evaluate, got None")
        subset_before, evaluated_before = state.eval_subset_num_batches, state.evaluated_at
        if subset_num_batches is not None:
            state.eval_subset_num_batches = checks.check_subset("subset_num_batches", subset_num_batches)
        self.engine.run_event(Event.EVAL_STANDALONE_START)
        evaluate(self.engine, readers, self._options.precision)
        self.engine.run_event(Event.EVAL_STANDALONE_END)
        state.eval_subset_num_batches = subset_before
        if eval_dataloader is not None or subset_num_batches is not None:
            state.evaluated_at = evaluated_before  # the evaluation at the end of training is still due
        return {**state.eval_metrics, **state.eval_tensors}

    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Run the model in evaluation mode on every batch of a dataloader.

        Args:
            dataloader: Yields batches that the model's ``forward`` takes.

        Returns:
            The outputs of each batch, in the order of the dataloader, on the CPU: ``torch.cat`` joins them if they
            are tensors. Under torchrun the ranks share the work, and each gets all outputs.

        Raises:
            ValueError: If `dataloader` yields no batch.
            RuntimeError: If the Trainer is closed.
        """
        checks.check_dataloader("dataloader", dataloader)
        self._check_open("predict")
        return predict(self.engine, open_predict_reader(self.state, dataloader), self._options.precision)

    def save_checkpoint(self, path: str | Path) -> None:
        """Save the run to a file from which `load_path` resumes it. All ranks must call it together.

        Args:
            path: The file.

        Raises:
            OSError: If the file cannot be written.
        """
        save_checkpoint(checks.check_folder("path", path), self.state, self.logger)

    def close(self) -> None:
        """Close all callbacks and loggers. The Trainer cannot fit or evaluate any more.

        Raises:
            ExceptionGroup: If some of them failed to close; the others are closed all the same.
        """
        self._step.close()
        self.engine.close()

    def _prepare_fit(self, duration: Any, train_dataloader: Iterable[Any] | None, reset_time: bool) -> None:
        """Set what `fit` was given, and check that there is something to train."""
        state = self.state
        with distributed.all_or_none():
            length = None if duration is None else checks.check_duration("duration", duration)
            if reset_time and self._saver is not None:
                raise ValueError(
                    "reset_time must be False with a CheckpointSaver, which names files by batch, got True"
                )
            if train_dataloader is not None:
                self._replace_train_dataloader(train_dataloader)
            if self._train_reader is None:
                raise ValueError("train_dataloader must be given to fit, got None")
            if not state.optimizers and state.timestamp.batch > 0:
                raise ValueError("optimizers and train_dataloader must be given to the Trainer to resume, got none")
            if length is None and state.max_duration is None:
                raise ValueError('max_duration or duration must be given to fit, for example "3ep", got None')
        if reset_time:
            state.timestamp, state.evaluated_at = Timestamp(), -1
        if length is not None:
            state.max_duration, state.is_stopped = state.timestamp.get(length.unit) + length, False
        if state.is_finished and self._resumed is None:
            raise RuntimeError(f'max_duration="{state.max_duration}" is reached: there is nothing left to fit')
        state.settings["max_duration"] = str(state.max_duration)
        check_same_on_all_ranks(state.settings)
        if not state.optimizers:
            state.optimizers = (default_optimizer(state.model),)

    def _replace_train_dataloader(self, train_dataloader: Iterable[Any]) -> None:
        state, before = self.state, self.state.train_dataloader
        state.train_dataloader = checks.check_dataloader("train_dataloader", train_dataloader)
        try:
            self._train_reader = open_train_reader(state, self._options)
        except ValueError:
            state.train_dataloader = before
            raise
        state.settings["train_dataloader"] = describe_dataloader(train_dataloader)
        if state.timestamp.batch_in_epoch > 0:
            state.timestamp = state.timestamp.to_next_epoch()

    def _fit(self, listener: SignalListener | None) -> None:
        state, run_event = self.state, self.engine.run_event
        if not state.model.training:
            state.model.train()  # only then: a user may have frozen a part of a model in training mode
        self._restore_generators()  # before the first event, as it may save them,
        run_event(Event.FIT_START)
        self._restore_generators()  # and after it, as it may draw from them
        self._eval_schedule.start()
        if self._resumed is not None and self._eval_schedule.is_overdue():
            self._evaluate()
        self._resumed = None
        while not state.is_finished or self._is_at_end_of_epoch():
            self._train_epoch(listener)
        self._step.settle()
        if self._eval_schedule and state.evaluated_at != state.timestamp.batch:
            self._evaluate()
        run_event(Event.FIT_END)
        if listener is not None and listener.received:  # after the last step: there is nothing to agree on
            raise TrainingInterrupted(listener.received)

    def _train_epoch(self, listener: SignalListener | None) -> None:
        """Train an epoch to its end, or what is left of one that was resumed in its middle."""
        state, run_event = self.state, self.engine.run_event
        started, start = time.perf_counter(), state.timestamp.batch_in_epoch
        if start == 0:
            run_event(Event.EPOCH_START)
        exhausted = self._train_batches(listener, start)
        if state.timestamp.batch_in_epoch == 0:
            raise ValueError("train_dataloader must yield at least one batch per epoch, it yielded none")
        if not exhausted:
            return
        self._step.settle()
        self._unfinished = Event.EPOCH_END
        state.timestamp = state.timestamp.to_next_epoch()
        if not self._options.step_schedulers_every_batch:
            self._step.step_schedulers()
        if start == 0:
            self.logger.log_metrics({"time/epoch_seconds": time.perf_counter() - started})
        run_event(Event.EPOCH_END)
        self._unfinished = None
        if self._eval_schedule.is_due(at_end_of_epoch=True):
            self._evaluate()
        run_event(Event.EPOCH_CHECKPOINT)

    def _is_at_end_of_epoch(self) -> bool:
        """Whether all batches of the running epoch are finished, and only its end is left."""
        assert self._train_reader is not None, "fit has checked it"
        epoch, number = int(self.state.timestamp.epoch), int(self.state.timestamp.batch_in_epoch)
        is_at_end = number == self.state.train_subset_num_batches or self._train_reader.is_at_end(epoch, number)
        return number > 0 and is_at_end

    def _train_batches(self, listener: SignalListener | None, start: int) -> bool:
        """Train the batches of an epoch from number `start` on; whether it has no more."""
        state, run_event = self.state, self.engine.run_event
        if start == state.train_subset_num_batches:
            return True  # resumed at the end of the subset
        state.dataloader_label = "train"
        assert self._train_reader is not None, "fit has checked it"
        events = Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER
        for _ in read_batches(self.engine, self._train_reader, *events, start=start):
            self._unfinished, self._batch = Event.BATCH_END, state.timestamp.batch
            is_interrupted = self._step(lambda: listener is not None and listener.received != 0)
            self._unfinished = None
            if self._eval_schedule.is_due(at_end_of_epoch=False):
                self._evaluate()
            run_event(Event.BATCH_CHECKPOINT)
            if is_interrupted:
                self._stop(listener)
            if state.is_finished:
                return self._is_at_end_of_epoch()
            if state.timestamp.batch_in_epoch == state.train_subset_num_batches:
                break
        return True

    def _evaluate(self) -> None:
        self._step.settle()
        evaluate(self.engine, self._eval_readers, self._options.precision)

    def _stop(self, listener: SignalListener | None) -> None:
        """Save, and end the training as the signal asked; on a rank that got none, as if it had been SIGTERM."""
        assert listener is not None and self._saver is not None, "without them nothing interrupts"
        self._saver.save_once(self.state, self.logger, must_succeed=True)
        raise TrainingInterrupted(listener.received or signal.SIGTERM)

    def _restore_generators(self) -> None:
        if self._resumed is not None:
            restore_generators(self._resumed, self.state.device)

    def _check_open(self, action: str) -> None:
        if self.engine.is_closed:
            raise RuntimeError(f"the Trainer is closed and cannot {action} any more: build a new one")

    def _is_between_steps(self) -> bool:
        """Whether model, optimizers and algorithms are as the latest step leaves them."""
        state, event = self.state, self._unfinished
        if event is Event.BATCH_END and state.timestamp.batch == self._batch:
            return False
        return event is None or not any(algorithm.match(event, state) for algorithm in state.algorithms)

    def _close_after(self, error: BaseException) -> None:
        try:
            self.close()
        except ExceptionGroup as group:
            error.add_note(f"while closing, too: {group!r}")
