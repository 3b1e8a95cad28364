"""One optimizer step: forward and backward in microbatches, gradient averaging over ranks, and the update."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine import Engine, Event, State
from . import distributed
from .data import batches
from .distributed.declarations import skippable_modules
from .distributed.parallelism import Synchronizer
from .flags import StepFlags, flag_step, flag_step_over_ranks
from .learning_rate import apply_schedules
from .loss import LossParts
from .pending_step import PendingStep, copy_schedules
from .precision import Precision, autocast
from .snapshot import Snapshot
from .update import can_skip_update, gradients, step_unless

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
        self._autocast = autocast(precision, engine.state.device)
        self._halve_microbatches = halve_microbatches
        self._max_nonfinite_steps = max_nonfinite_steps
        self._does_step_schedulers = step_schedulers
        self._synchronizer = synchronizer
        self._pending: PendingStep | None = None
        self._is_interrupted = False
        self._parts = LossParts()
        self._state.settle = self.settle
        self._warn_of_waits()

    def __call__(self, is_interrupted: Callable[[], bool]) -> bool:
        """Run the step.

        Args:
            is_interrupted: Whether this process was asked to stop.

        Returns:
            Whether any rank was asked to stop. Requests to other ranks are seen one step later.

        Raises:
            FloatingPointError: If loss or gradients of more than `max_nonfinite_steps` consecutive steps are not
                finite. Parameters, buffers, optimizers, schedulers and the timestamp are restored to their values
                before the last of these steps.
            RankLostError: If another rank does not respond.
        """
        state, run_event = self._state, self._engine.run_event
        apply_schedules(state)
        run_event(Event.BATCH_START)
        run_event(Event.BEFORE_TRAIN_BATCH)
        step = self._compute_gradients(is_interrupted)
        if self._pending is not None:
            self.settle()  # the step before
        is_gated = self._can_skip_update()
        if not is_gated:
            self._settle_now(step)
        was_interrupted = self._is_interrupted
        if state.scaler.is_enabled():
            self._unscale_gradients()
        run_event(Event.AFTER_TRAIN_BATCH)
        if is_gated:
            self._update_unless_nonfinite(step)
        else:
            self._step_optimizers()
        lr = state.optimizers[0].param_groups[0]["lr"]
        lr = lr.clone() if isinstance(lr, Tensor) else lr  # a scheduler changes a tensor in place
        if self._does_step_schedulers:
            self.step_schedulers()
        if self._synchronizer is not None:
            self._synchronizer.end_step()
        state.timestamp = state.timestamp.to_next_batch(state.global_batch_num_samples)
        metrics = {"epoch": state.timestamp.epoch.value, "loss/train/total": step.flags.loss, "lr": lr}
        if self._parts.sums:
            metrics |= self._parts.means_over_ranks(state.global_batch_num_samples)
        self._engine.logger.log_metrics(metrics)
        run_event(Event.BATCH_END)
        return is_interrupted() if state.world_size == 1 else was_interrupted

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
        self._state.num_nonfinite_steps += 1
        if self._state.num_nonfinite_steps > self._max_nonfinite_steps:
            step.undo(self._state)
            raise FloatingPointError(
                f"{step.what_is_nonfinite()}, and at most max_nonfinite_steps={self._max_nonfinite_steps} such steps "
                "in a row are skipped; parameters and optimizers are as they were before the step"
            )
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
        if state.device.type == "cpu" or state.rank != 0 or not (waiting or state.scaler.is_enabled()):
            return
        _log.warning(
            "each step waits for the device before its update: %s; SGD, Adam, AdamW and Adagrad with fused=True do not",
            "the loss scaler" if state.scaler.is_enabled() else f"{waiting[0]} cannot skip an update on the device",
        )

    def _compute_gradients(self, is_interrupted: Callable[[], bool]) -> PendingStep:
        """Compute the averaged gradients of the step; repeat with smaller microbatches after out of memory."""
        state, synchronizer = self._state, self._synchronizer
        snapshot = Snapshot(state.model, state.device if self._halve_microbatches else None)
        while True:
            if synchronizer is not None:
                synchronizer.begin_step()
            state.model.zero_grad(set_to_none=True)  # also clears gradients of parameters without an optimizer
            loss = self._try_microbatches()
            is_out_of_memory = loss is None
            if self._halve_microbatches and state.world_size > 1:
                is_out_of_memory = distributed.sum_over_ranks([is_out_of_memory])[0] > 0
            if loss is not None and not is_out_of_memory:
                break
            snapshot.restore()
            self._halve()
        if synchronizer is not None and self._halve_microbatches:
            synchronizer.finish()
        flags = self._flag(loss, is_interrupted)
        if synchronizer is not None and synchronizer.has_changed:
            flags.read().check_same(state.timestamp.batch)
            synchronizer.adopt_changes()
        return PendingStep(flags, snapshot, state.timestamp)

    def _flag(self, loss: Tensor, is_interrupted: Callable[[], bool]) -> StepFlags:
        state = self._state
        # fp16 gradients may overflow; the loss scaler checks them.
        used = [] if state.scaler.is_enabled() else gradients(state.optimizers)
        if self._synchronizer is None:
            return flag_step(loss, used)
        return flag_step_over_ranks(
            loss,
            used,
            share=state.batch_num_samples / state.global_batch_num_samples,
            is_interrupted=is_interrupted(),
            fingerprints=[*self._synchronizer.fingerprints(), state.batch_fingerprint],
        )

    def _can_skip_update(self) -> bool:
        return not self._state.scaler.is_enabled() and all(map(can_skip_update, self._state.optimizers))

    def _settle_now(self, step: PendingStep) -> None:
        """Wait for the flags of a step before its update; clear the gradients if they are not finite."""
        self._pending = step
        self.settle()
        if self._state.num_nonfinite_steps > 0:
            self._state.model.zero_grad(set_to_none=True)

    def _update_unless_nonfinite(self, step: PendingStep) -> None:
        """Launch the update; the device skips it if loss or gradients are not finite."""
        if self._does_step_schedulers:
            step.schedules = list(copy_schedules(self._state))
        step.created = step_unless(step.flags.found_nonfinite, self._state.optimizers)
        self._pending = step
        if self._max_nonfinite_steps > 0 and not step.restore_buffers_if_nonfinite():
            self.settle()

    def _unscale_gradients(self) -> None:
        for optimizer in filter(_has_gradient, self._state.optimizers):
            self._state.scaler.unscale_(optimizer)

    def _step_optimizers(self) -> None:
        scaler = self._state.scaler
        if not scaler.is_enabled():
            for optimizer in self._state.optimizers:
                optimizer.step()
            return
        # GradScaler.step raises for an optimizer without any gradient, which happens if all its blocks are dropped.
        if used := list(filter(_has_gradient, self._state.optimizers)):
            for optimizer in used:
                scaler.step(optimizer)
            scaler.update()

    def _try_microbatches(self) -> Tensor | None:
        """The mean loss over this rank's rows; None if it ran out of memory and can be repeated."""
        if not self._halve_microbatches:
            return self._train_microbatches()
        batch = self._state.batch
        try:
            return self._train_microbatches()
        except torch.OutOfMemoryError:
            if (self._state.device_train_microbatch_size or self._state.batch_num_samples) == 1:
                raise
        # Outside of the except block: the exception keeps tensors of the failed pass alive.
        self._state.batch, self._state.outputs, self._state.loss = batch, None, None
        self._state.model.zero_grad(set_to_none=True)
        if self._state.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _train_microbatches(self) -> Tensor:
        """Run forward and backward of all microbatches. Returns the mean loss over this rank's rows."""
        state = self._state
        batch, size, num_rows = state.batch, state.device_train_microbatch_size, state.batch_num_samples
        self._parts = LossParts()
        # Gradients are averaged over ranks, so scale by the number of rows relative to the mean over ranks.
        weight = num_rows * state.world_size / state.global_batch_num_samples
        if size is None or size >= num_rows:
            state.microbatch_start, state.microbatch_num_samples = 0, num_rows
            return self._train_microbatch(batch, weight, is_last=True)
        total = torch.zeros((), device=state.device)
        for start, microbatch in zip(range(0, num_rows, size), batches.split(batch, size), strict=True):
            state.microbatch_start = start
            state.microbatch_num_samples = min(size, num_rows - start)
            share = state.microbatch_num_samples / num_rows
            total += share * self._train_microbatch(microbatch, share * weight, is_last=start + size >= num_rows)
        state.batch = batch
        return total

    def _train_microbatch(self, microbatch: Any, share: float, *, is_last: bool) -> Tensor:
        state, run_event = self._state, self._engine.run_event
        model: Any = state.model
        state.batch = microbatch
        with self._autocast:
            run_event(Event.BEFORE_FORWARD)
            state.outputs = model(state.batch)
            run_event(Event.AFTER_FORWARD)
            run_event(Event.BEFORE_LOSS)
            state.loss = self._parts.add(model.loss(state.outputs, state.batch), state.microbatch_num_samples)
            run_event(Event.AFTER_LOSS)
        run_event(Event.BEFORE_BACKWARD)
        loss = state.loss if share == 1.0 else state.loss * share
        # If the step may be repeated, gradients are only reduced when no rank ran out of memory.
        averages = is_last and self._synchronizer is not None and not self._halve_microbatches
        self._backward(loss, averages)
        if self._synchronizer is None:
            run_event(Event.AFTER_BACKWARD)
        else:
            with self._gradients_guarded(self._synchronizer, averages):
                run_event(Event.AFTER_BACKWARD)
        return state.loss.detach()

    def _backward(self, loss: Tensor, averages: bool) -> None:
        """Run the backward pass; `averages` reduces the gradients over ranks."""
        if averages:
            assert self._synchronizer is not None, "only several ranks average"
            self._synchronizer.begin_last_backward()
        if loss.requires_grad:
            scaler = self._state.scaler
            (scaler.scale(loss) if scaler.is_enabled() else loss).backward()
        elif not _may_skip_all(self._state):
            raise RuntimeError(
                "the loss must depend on a parameter that requires a gradient, got one that depends on none"
            )
        if averages:
            assert self._synchronizer is not None, "only several ranks average"
            self._synchronizer.finish()

    def _gradients_guarded(self, synchronizer: Synchronizer, are_averaged: bool) -> AbstractContextManager[None]:
        """Context for AFTER_BACKWARD that refuses edits of gradients before they are averaged over ranks."""
        return nullcontext() if are_averaged and not synchronizer.has_changed else synchronizer.refuse_edits()

    def _halve(self) -> None:
        state = self._state
        largest = -(-state.global_batch_num_samples // state.world_size)  # the same on all ranks
        size = state.device_train_microbatch_size or largest
        state.device_train_microbatch_size = max(1, -(-min(size, largest) // 2))
        if state.rank == 0:
            size = state.device_train_microbatch_size
            _log.warning("out of memory: the step is repeated with device_train_microbatch_size=%d", size)


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _may_skip_all(state: State) -> bool:
    """Whether a step may leave every parameter without a gradient, as when all trainable blocks are dropped."""
    has_trainable = any(parameter.requires_grad for parameter in state.model.parameters())
    may_skip = any(algorithm.find_unused_parameters for algorithm in state.algorithms)
    return has_trainable and (may_skip or bool(skippable_modules(state.model)))
