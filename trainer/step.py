"""One optimizer step: forward and backward in microbatches, gradient averaging over ranks, and the update."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..engine import Engine, Event
from .distributed.parallelism import Synchronizer
from .flags import StepFlags, flag_step, flag_step_over_ranks
from .forward_backward import ForwardBackward
from .learning_rate import apply_schedules
from .pending_step import PendingStep, copy_schedules, copy_states
from .precision import Precision
from .update import can_skip_update, gradients, step_unless, unscale

_log = logging.getLogger(__name__)


class TrainStep:
    """Runs one optimizer step on the batch in the state, with all events of the step.

    Whether loss and gradients are finite on all ranks is computed on the device, which skips the update if they are
    not. The host reads the result just before the next update, or in `settle`. If an optimizer cannot skip its update
    on the device (`can_skip_update`), the host waits for the result before the update of the same step.

    Args:
        engine: Runs the events.
        precision: Dtype of the forward pass.
        halve_microbatches: Whether to repeat a step that ran out of memory in microbatches of half the size.
        max_nonfinite_steps: Maximum number of consecutive steps that are skipped because loss or gradients are not
            finite; the next one raises.
        step_schedulers: Whether schedulers step with the optimizers.
        synchronizer: Averages the gradients over ranks; None in a single process.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        precision: Precision,
        halve_microbatches: bool,
        max_nonfinite_steps: int,
        step_schedulers: bool,
        synchronizer: Synchronizer | None,
    ) -> None:
        self._engine = engine
        self._state = engine.state
        self._forward_backward = ForwardBackward(
            engine, precision=precision, halve_microbatches=halve_microbatches, synchronizer=synchronizer
        )
        self._max_nonfinite_steps = max_nonfinite_steps
        self._does_step_schedulers = step_schedulers
        self._synchronizer = synchronizer
        self._pending: PendingStep | None = None
        self._running: tuple[PendingStep, Any] | None = None  # with its batch, while AFTER_TRAIN_BATCH runs
        self._states: Sequence[tuple[Callable[[Any], Any], Any]] = ()
        self._schedules: Sequence[tuple[Any, Any]] = ()
        self._is_interrupted = False
        self._state.settle = self.settle
        self._state.recompute_gradients = self.recompute_gradients
        self._warn_of_waits()

    def begin(self) -> None:
        """Copy the states of algorithms, callbacks and schedulers. Call it before the batch of the step is read."""
        self._states = copy_states(self._state)
        if self._does_step_schedulers or self._state.schedules:
            self._schedules = list(copy_schedules(self._state))

    def __call__(self, is_interrupted: Callable[[], bool]) -> bool:
        """Run the step.

        Args:
            is_interrupted: Whether this process was asked to stop.

        Returns:
            Whether any rank was asked to stop. Requests to other ranks are seen one step later.

        Raises:
            FloatingPointError: If loss or gradients of more than `max_nonfinite_steps` consecutive steps are not
                finite. Parameters, buffers, optimizers, schedulers, algorithms, callbacks and the timestamp are
                restored to their values before the last of these steps.
            RankLostError: If another rank does not respond.
        """
        state, run_event = self._state, self._engine.run_event
        apply_schedules(state)
        run_event(Event.BATCH_START)
        run_event(Event.BEFORE_TRAIN_BATCH)
        batch = state.batch
        loss, snapshot = self._forward_backward()
        loss_parts = self._forward_backward.parts
        step = PendingStep(self._flag(loss, is_interrupted()), snapshot, state.timestamp, self._states, self._schedules)
        if self._pending is not None:
            self.settle()  # the step before
        unscale(state.optimizers, state.scaler)
        self._running = step, batch
        run_event(Event.AFTER_TRAIN_BATCH)
        self._running = None
        state.found_nonfinite = step.flags.found_nonfinite
        must_wait = not all(map(can_skip_update, state.optimizers))
        if must_wait:
            self._settle_now(step)
        was_interrupted = self._is_interrupted
        self._update(step, is_settled=must_wait)
        lr = state.optimizers[0].param_groups[0]["lr"]
        lr = lr.clone() if isinstance(lr, Tensor) else lr  # a scheduler changes a tensor in place
        if self._does_step_schedulers:
            self.step_schedulers()
        if self._synchronizer is not None:
            self._synchronizer.end_step()
        state.timestamp = state.timestamp.to_next_batch(state.global_batch_num_samples)
        state.epoch_loss.add(step.flags.loss, state.global_batch_num_samples)
        metrics = {"epoch": state.timestamp.epoch.value, "loss/train/total": step.flags.loss, "lr": lr}
        if loss_parts.sums:
            metrics |= loss_parts.means_over_ranks(state.global_batch_num_samples)
        self._engine.logger.log_metrics(metrics)
        run_event(Event.BATCH_END)
        return is_interrupted() if state.world_size == 1 else was_interrupted

    def recompute_gradients(self) -> None:
        """Replace the gradients of the running step by those at the current weights, see `State`.

        Raises:
            RuntimeError: If it is not called at AFTER_TRAIN_BATCH, or gradients are scaled.
        """
        if self._running is None:
            raise RuntimeError("recompute_gradients must be called at AFTER_TRAIN_BATCH, not at another event")
        state, running, kept = self._state, self._running, (self._state.batch, self._state.outputs, self._state.loss)
        if state.scaler.is_enabled():
            raise RuntimeError(
                "recompute_gradients needs precision='fp32' or 'amp_bf16', got 'amp_fp16', whose loss scaler unscales "
                "gradients once per step"
            )
        step, state.batch = running
        self._running = None
        loss, _ = self._forward_backward()
        step.flags = step.flags.followed_by(self._flag(loss, is_interrupted=False))
        self._running = running
        state.batch, state.outputs, state.loss = kept

    def settle(self) -> None:
        """Wait for the flags of the last step and act on them. Does nothing if they were read already.

        Raises:
            FloatingPointError: As `__call__`.
            RuntimeError: If ranks used different parameters or batches.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        known = step.flags.read()
        if known.fingerprints:
            self._is_interrupted |= known.is_interrupted
            try:
                known.check_same(step.timestamp.batch)
            except RuntimeError:
                step.undo(self._state)
                raise
        if not known.is_nonfinite:
            self._state.num_nonfinite_steps = 0
            return
        if self._state.num_nonfinite_steps >= self._max_nonfinite_steps:
            step.undo(self._state)
            raise FloatingPointError(
                f"{step.what_is_nonfinite()}, and at most max_nonfinite_steps={self._max_nonfinite_steps} such steps "
                "in a row are skipped; parameters and optimizers are as they were before the step"
            )
        self._state.num_nonfinite_steps += 1
        step.skip()
        if self._state.rank == 0:
            _log.warning("%s: the step is skipped", step.what_is_nonfinite())

    def step_schedulers(self) -> None:
        for scheduler in self._state.schedulers:
            scheduler.step()

    def close(self) -> None:
        """Remove all hooks from the model."""
        if self._synchronizer is not None:
            self._synchronizer.close()

    def _warn_of_waits(self) -> None:
        state = self._state
        waiting = [type(optimizer).__name__ for optimizer in state.optimizers if not can_skip_update(optimizer)]
        if waiting and state.device.type != "cpu" and state.rank == 0:
            _log.warning(
                "each step waits for the device before its update, because %s cannot skip an update on the device; "
                "SGD, Adam, AdamW and Adagrad with fused=True can",
                waiting[0],
            )

    def _flag(self, loss: Tensor, is_interrupted: bool) -> StepFlags:
        state, synchronizer = self._state, self._synchronizer
        # fp16 gradients may overflow; the loss scaler checks them.
        used = [] if state.scaler.is_enabled() else gradients(state.optimizers)
        if synchronizer is None:
            return flag_step(loss, used)
        flags = flag_step_over_ranks(
            loss,
            used,
            share=state.batch_num_samples / state.global_batch_num_samples,
            is_interrupted=is_interrupted,
            fingerprints=[*synchronizer.fingerprints(), state.batch_fingerprint],
        )
        if synchronizer.has_changed:
            flags.read().check_same(state.timestamp.batch)
            synchronizer.adopt_changes()
        return flags

    def _settle_now(self, step: PendingStep) -> None:
        """Wait for the flags of a step before its update; clear the gradients if they are not finite."""
        self._pending = step
        self.settle()
        if self._state.num_nonfinite_steps > 0 and not self._state.scaler.is_enabled():
            self._state.model.zero_grad(set_to_none=True)

    def _update(self, step: PendingStep, *, is_settled: bool) -> None:
        """Launch the update; the device skips it if loss or gradients are not finite."""
        step.created = step_unless(step.flags.found_nonfinite, self._state.optimizers, self._state.scaler)
        if is_settled:
            return
        self._pending = step
        if self._max_nonfinite_steps > 0 and not step.restore_buffers_if_nonfinite():
            self.settle()
