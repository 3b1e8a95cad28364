"""The Trainer: training, evaluation, prediction and checkpoints of one model."""

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
from .checkpoint.saver import save_after, save_checkpoint
from .distributed.parallelism import Parallelism
from .evaluation import evaluate
from .precision import Precision
from .prediction import predict
from .settings import check_same_on_all_ranks, describe_dataloader
from .signals import SignalListener


class Trainer:
    """Trains and evaluates a model; algorithms and callbacks act at every `Event`.

    The model is an ``nn.Module`` with ``forward(batch)`` and ``loss(outputs, batch)``, which returns the mean over the
    batch, or a tuple or dictionary of losses whose sum is minimized. Evaluation metrics are optional:
    ``get_metrics(is_train)`` returns torchmetrics objects by name, ``update_metric(batch, outputs, metric)`` updates
    one of them.

    The constructor seeds all global generators (Python, NumPy, torch) and runs INIT on the unwrapped model. Batches
    depend only on the seed, the epoch and their index in it, not on the number of loader workers or on other uses of
    random numbers.

    Under torchrun each batch is split over the ranks, so the same settings give the same training on any number of
    ranks, except that BatchNorm sees the rows of its rank unless `sync_batchnorm` is set. Only rank 0 logs and saves.

    Args:
        model: The model to train; it is modified in place.
        train_dataloader: Yields the batches of an epoch: tensors, or tuples, lists and dictionaries of tensors, with
            one row per sample. Its batch size is the total over all ranks.
        eval_dataloader: Yields the batches of an evaluation. Several sets of data are given as a dictionary of names
            to dataloaders or as a list of `Evaluator` objects.
        max_duration: Duration of training: ``"3ep"``, ``"100ba"``, ``"6400sp"`` or a `Time`; an int counts epochs.
        algorithms: Algorithms, in the order in which they run.
        optimizers: One or several optimizers; by default AdamW with torch's defaults, which logs a warning.
        schedulers: torch learning rate schedulers of these optimizers; or functions of the `State`, such as those in
            ``etude.optim``, that return a factor of the initial learning rates for each step.
        step_schedulers_every_batch: Step torch schedulers after every batch instead of every epoch.
        callbacks: Callbacks, which run after the algorithms.
        loggers: Where metrics are logged, besides the files of a named run.
        device: ``"cpu"``, ``"gpu"`` or a torch device; by default the GPU if there is one.
        precision: ``"fp32"``, or ``"amp_bf16"`` or ``"amp_fp16"`` for automatic mixed precision.
        compile_config: Options of ``torch.compile`` by name, ``{}`` for its defaults; by default nothing is compiled.
            Blocks with stochastic depth are compiled each by itself, so that rates and drop plans recompile nothing.
        device_train_microbatch_size: Rows per forward and backward pass on a device. Gradients are accumulated over
            the microbatches; BatchNorm sees microbatches. ``"auto"`` starts with the whole batch, and repeats a step
            that runs out of memory on any rank in microbatches of half the size, with the same drop plan.
        eval_interval: Interval between evaluations, in any unit but wall-clock time; an int counts epochs; by default
            one epoch. There is always an evaluation at the end of training. 0 disables evaluation.
        train_subset_num_batches: Maximum number of batches per epoch; None or -1 for all.
        eval_subset_num_batches: Maximum number of batches per evaluation; None or -1 for all.
        seed: Seed of all generators, in [0, 2**32).
        deterministic_mode: Use deterministic kernels only, on CPU and GPU.
        run_name: Metrics are written to ``runs/<run_name>/``; None writes no files.
        progress_bar: Show progress on standard error.
        save_folder: Folder for checkpoints, which a `CheckpointSaver` writes; pass one in `callbacks` for more
            settings. SIGTERM and SIGINT then finish the current step, save a checkpoint, and raise
            `TrainingInterrupted`.
        save_interval: Interval between checkpoints, in any unit: ``"1ep"`` (default), ``"500ba"``, ``"0.1dur"``,
            ``"10min"``.
        save_num_checkpoints_to_keep: Number of newest checkpoints to keep (default 3); -1 keeps all.
        load_path: A checkpoint, or a folder of them, to resume from.
        load_weights_only: Load only the weights from `load_path`, for a new training.
        autoresume: Resume from the newest intact checkpoint in `save_folder`, if there is one.
        max_nonfinite_steps: Maximum number of consecutive steps that are skipped because loss or gradients are not
            finite. The next one raises.
        parallelism: Under torchrun, ``"ddp"`` replicates the model on every rank, ``"fsdp"`` shards the model and its
            optimizers.
        find_unused_parameters: Whether ranks may use different parameters in a step, as in models with data-dependent
            branches.
        sync_batchnorm: Compute BatchNorm statistics over the rows of all ranks.
        dist_timeout: Timeout in seconds for other ranks to respond; must be longer than saving a checkpoint takes.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the value of an argument is invalid. Model and files are then unchanged.
        FileExistsError: If the folder of the run has metrics already and no checkpoint is resumed.
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
        compile_config: dict[str, Any] | None = None,
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
        self._loop = parts.loop

    def fit(
        self,
        duration: str | int | Time | None = None,
        train_dataloader: Iterable[Any] | None = None,
        *,
        reset_time: bool = False,
    ) -> None:
        """Train until `max_duration` is reached.

        An exception closes the Trainer and is raised again. With a `CheckpointSaver`, in a single process, the last
        finished step is saved first. A run that was resumed at its end only does the evaluation that is still due, and
        FIT_END.

        Args:
            duration: Train for this duration from here on, instead of until `max_duration`. An int counts epochs.
            train_dataloader: Replaces the dataloader of the Trainer, from a new epoch on.
            reset_time: Reset the counters of epochs, batches and samples to 0.

        Raises:
            ValueError: If there is no training data, or a batch is not what the model takes.
            RuntimeError: If the Trainer is closed, or `max_duration` is reached already.
            FloatingPointError: If loss or gradients are not finite in more than `max_nonfinite_steps` steps in a row.
            TrainingInterrupted: If any rank received SIGTERM or SIGINT and there is a `CheckpointSaver`. It is a
                SystemExit with code 128 + signal number.
            RankLostError: If another rank does not respond.
        """
        self._check_open("fit")
        self._prepare_fit(duration, train_dataloader, reset_time)
        try:
            self.logger.log_hyperparameters(self.state.settings)
            with SignalListener() if self._saver is not None else nullcontext() as listener:
                self._loop.run(listener)
        except BaseException as error:
            if self._saver is not None and self._loop.is_between_steps():
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
            eval_dataloader: As in the constructor; by default the evaluation data of the Trainer.
            subset_num_batches: Maximum number of batches; by default `eval_subset_num_batches`, -1 for all.

        Returns:
            Loss and metrics by name: floats, and CPU tensors for metrics with more than one element.

        Raises:
            ValueError: If there is no evaluation data.
            RuntimeError: If the Trainer is closed.
        """
        self._check_open("eval")
        state, readers = self.state, self._loop.eval_readers
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
            state.evaluated_at = evaluated_before  # does not replace the evaluation at the end of training
        return {**state.eval_metrics, **state.eval_tensors}

    def predict(self, dataloader: Iterable[Any]) -> list[Any]:
        """Run the model in evaluation mode on every batch of a dataloader.

        Args:
            dataloader: Yields batches for the model's ``forward``.

        Returns:
            The outputs of each batch on the CPU, in the order of the dataloader. Under torchrun each batch is split
            over the ranks, and every rank gets all outputs.

        Raises:
            ValueError: If `dataloader` yields no batch.
            RuntimeError: If the Trainer is closed.
        """
        checks.check_dataloader("dataloader", dataloader)
        self._check_open("predict")
        return predict(self.engine, open_predict_reader(self.state, dataloader), self._options.precision)

    def save_checkpoint(self, path: str | Path) -> None:
        """Save a checkpoint that `load_path` can resume from. All ranks must call it together.

        Raises:
            OSError: If `path` cannot be written.
        """
        save_checkpoint(checks.check_folder("path", path), self.state, self.logger)

    def close(self) -> None:
        """Close all callbacks and loggers. The Trainer cannot be used after that.

        Raises:
            ExceptionGroup: If closing some of them failed; all others are closed.
        """
        self._loop.close()
        self.engine.close()

    def _prepare_fit(self, duration: Any, train_dataloader: Iterable[Any] | None, reset_time: bool) -> None:
        """Check and apply the arguments of `fit`."""
        state = self.state
        with distributed.all_or_none():
            length = None if duration is None else checks.check_duration("duration", duration)
            if reset_time and self._saver is not None:
                raise ValueError(
                    "reset_time must be False with a CheckpointSaver, which names files by batch, got True"
                )
            if train_dataloader is not None:
                self._replace_train_dataloader(train_dataloader)
            if self._loop.train_reader is None:
                raise ValueError("train_dataloader must be given to fit, got None")
            if not state.optimizers and state.timestamp.batch > 0:
                raise ValueError("optimizers and train_dataloader must be given to the Trainer to resume, got none")
            if length is None and state.max_duration is None:
                raise ValueError('max_duration or duration must be given to fit, for example "3ep", got None')
        if reset_time:
            state.timestamp, state.evaluated_at = Timestamp(), -1
        if length is not None:
            state.max_duration, state.is_stopped = state.timestamp.get(length.unit) + length, False
        if state.is_finished and self._loop.resumed is None:
            raise RuntimeError(f'max_duration="{state.max_duration}" is reached, there is nothing left to train')
        state.settings["max_duration"] = str(state.max_duration)
        check_same_on_all_ranks(state.settings)
        if not state.optimizers:
            state.optimizers = (default_optimizer(state.model),)

    def _replace_train_dataloader(self, train_dataloader: Iterable[Any]) -> None:
        state, before = self.state, self.state.train_dataloader
        state.train_dataloader = checks.check_dataloader("train_dataloader", train_dataloader)
        try:
            self._loop.train_reader = open_train_reader(state, self._options)
        except ValueError:
            state.train_dataloader = before
            raise
        state.settings["train_dataloader"] = describe_dataloader(train_dataloader)
        if state.timestamp.batch_in_epoch > 0:
            state.timestamp = state.timestamp.to_next_epoch()

    def _check_open(self, action: str) -> None:
        if self.engine.is_closed:
            raise RuntimeError(f"the Trainer is closed and cannot {action} any more: build a new one")

    def _close_after(self, error: BaseException) -> None:
        try:
            self.close()
        except ExceptionGroup as group:
            error.add_note(f"while closing, too: {group!r}")
