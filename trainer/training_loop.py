"""The training loop: epochs, batches and the evaluations between them. `Event` shows it as pseudocode."""

import signal
import time
from typing import Any

from ..engine import Engine, Evaluator, Event
from .checkpoint.contents import restore_generators
from .checkpoint.saver import CheckpointSaver
from .checks import check_attached
from .data.batches import read_batches
from .data.reader import EpochReader
from .eval_schedule import EvalSchedule
from .evaluation import evaluate
from .options import Options
from .signals import SignalListener, TrainingInterrupted
from .step import TrainStep


class TrainingLoop:
    """Trains until `State.max_duration` is reached, and evaluates in between.

    Args:
        engine: Runs the events.
        step: Runs one optimizer step.
        options: Options of the Trainer.
        train_reader: Reads the training data; None without any.
        eval_readers: Each set of evaluation data with its reader.
        saver: Saves a checkpoint when training is interrupted by a signal; None without one.
        resumed: Contents of the checkpoint that the run resumes from, for `restore_generators`; None in a new run.
    """

    def __init__(
        self,
        engine: Engine,
        step: TrainStep,
        options: Options,
        *,
        train_reader: EpochReader | None,
        eval_readers: list[tuple[Evaluator, EpochReader]],
        saver: CheckpointSaver | None,
        resumed: dict[str, Any] | None,
    ) -> None:
        self.train_reader = train_reader
        self.eval_readers = eval_readers
        self.resumed = resumed  # None after the first evaluation or step
        self._engine = engine
        self._state = engine.state
        self._step = step
        self._options = options
        self._saver = saver
        self._eval_schedule = EvalSchedule(engine.state, options.eval_interval)
        self._unfinished: Event | None = None  # the event that ends the current step or epoch
        self._batch = self._state.timestamp.batch  # at the start of the current step

    def run(self, listener: SignalListener | None) -> None:
        """Run the loop, from FIT_START to FIT_END.

        Args:
            listener: Receives the signals that interrupt training; None if they are not handled.
        """
        state, run_event = self._state, self._engine.run_event
        if not state.model.training:
            state.model.train()  # not if it is in training mode, so that modules in evaluation mode stay in it
        state.dataloader_label = "train"
        self._restore_generators()  # before FIT_START, where callbacks may save them,
        run_event(Event.FIT_START)
        self._restore_generators()  # and after it, as they may draw from them
        self._eval_schedule.start()
        if self.resumed is not None and self._eval_schedule.is_overdue():
            self._evaluate()
        self.resumed = None
        while not state.is_finished or self._is_at_end_of_epoch():
            self._train_epoch(listener)
        self._step.settle()
        if self._eval_schedule and state.evaluated_at != state.timestamp.batch:
            self._evaluate()
        run_event(Event.FIT_END)
        if listener is not None and listener.received:  # after the last step, so ranks need not agree to stop
            raise TrainingInterrupted(listener.received)

    def is_between_steps(self) -> bool:
        """Whether model, optimizers and algorithms are as the last finished step left them."""
        state, event = self._state, self._unfinished
        if event is Event.BATCH_END and state.timestamp.batch == self._batch:
            return False
        return event is None or not any(algorithm.match(event, state) for algorithm in state.algorithms)

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._step.close()

    def _train_epoch(self, listener: SignalListener | None) -> None:
        """Train one epoch, or the rest of an epoch that was resumed."""
        state, run_event = self._state, self._engine.run_event
        started, start = time.perf_counter(), state.timestamp.batch_in_epoch
        if start == 0:
            state.epoch_loss.reset()
            run_event(Event.EPOCH_START)
        check_attached(state)
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
        metrics = {} if state.epoch_loss.mean is None else {"loss/train/epoch": state.epoch_loss.mean}
        if start == 0:
            metrics["time/epoch_seconds"] = time.perf_counter() - started
        self._engine.logger.log_metrics(metrics)
        run_event(Event.EPOCH_END)
        self._unfinished = None
        if self._eval_schedule.is_due(at_end_of_epoch=True):
            self._evaluate()
        run_event(Event.EPOCH_CHECKPOINT)

    def _is_at_end_of_epoch(self) -> bool:
        """Whether all batches of the current epoch are finished, but not the epoch itself."""
        assert self.train_reader is not None, "Trainer.fit checks it"
        epoch, number = int(self._state.timestamp.epoch), int(self._state.timestamp.batch_in_epoch)
        is_at_end = number == self._state.train_subset_num_batches or self.train_reader.is_at_end(epoch, number)
        return number > 0 and is_at_end

    def _train_batches(self, listener: SignalListener | None, start: int) -> bool:
        """Train the batches of an epoch from number `start` on. Returns whether the epoch is at its end."""
        state, run_event = self._state, self._engine.run_event
        if start == state.train_subset_num_batches:
            return True  # resumed at the end of the subset
        assert self.train_reader is not None, "Trainer.fit checks it"
        events = Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER
        self._step.begin()
        for _ in read_batches(self._engine, self.train_reader, *events, start=start):
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
            self._step.begin()
        return True

    def _evaluate(self) -> None:
        self._step.settle()
        evaluate(self._engine, self.eval_readers, self._options.precision)

    def _stop(self, listener: SignalListener | None) -> None:
        """Save a checkpoint and raise. A rank that received no signal reports SIGTERM."""
        assert listener is not None and self._saver is not None, "signals are handled only with a saver"
        self._saver.save_once(self._state, self._engine.logger, must_succeed=True)
        raise TrainingInterrupted(listener.received or signal.SIGTERM)

    def _restore_generators(self) -> None:
        if self.resumed is not None:
            restore_generators(self.resumed, self._state.device)
