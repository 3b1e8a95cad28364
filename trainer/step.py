"""One optimizer step: forward and backward in microbatches, gradients averaged over ranks, the update."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine import Engine, Event
from . import distributed
from .checks import check_loss
from .data import batches
from .distributed.parallelism import Synchronizer
from .precision import Precision, autocast
from .snapshot import Snapshot

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outcome:
    """What all ranks know about a step before its update."""

    loss: Tensor
    is_out_of_memory: bool = False
    is_interrupted: bool = False


class TrainStep:
    """Makes one optimizer step of the batch in the engine's state, with all events on the way.

    The ranks tell each other once per step how it went, before the update: what one of them has met is
    then dealt with by all.

    Args:
        engine: Told of every event.
        precision: Number format of the forward pass.
        halve_microbatches: Whether to repeat a step that ran out of memory in microbatches of half the size.
        max_nonfinite_steps: How many steps in a row may be left out because their loss was NaN or
            infinite; one more is an error.
        step_schedulers: Whether schedulers step with the optimizers.
        synchronizer: Averages the gradients over ranks; None in a process that is alone.
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
        self._precision = precision
        self._halve_microbatches = halve_microbatches
        self._max_nonfinite_steps = max_nonfinite_steps
        self._does_step_schedulers = step_schedulers
        self._synchronizer = synchronizer

    def __call__(self, is_interrupted: Callable[[], bool]) -> bool:
        """Make the step.

        Args:
            is_interrupted: Whether this process has been asked to stop.

        Returns:
            Whether any rank has been asked to stop.

        Raises:
            FloatingPointError: If the loss of too many steps was NaN or infinite. Parameters and
                optimizers are as they were before the step.
            RankLostError: If another rank does not answer.
        """
        state, run_event = self._state, self._engine.run_event
        run_event(Event.BATCH_START)
        run_event(Event.BEFORE_TRAIN_BATCH)
        outcome = self._train_or_repeat(is_interrupted)
        self._unscale_gradients()
        run_event(Event.AFTER_TRAIN_BATCH)
        self._step_optimizers()
        lr = state.optimizers[0].param_groups[0]["lr"]
        lr = lr.clone() if isinstance(lr, Tensor) else lr  # a scheduler changes a tensor in place
        if self._does_step_schedulers:
            self.step_schedulers()
        state.timestamp = state.timestamp.to_next_batch(state.global_batch_num_samples)
        metrics = {"epoch": state.timestamp.epoch.value, "loss/train/total": outcome.loss, "lr": lr}
        self._engine.logger.log_metrics(metrics)
        run_event(Event.BATCH_END)
        return outcome.is_interrupted

    def close(self) -> None:
        """Let go of the model."""
        if self._synchronizer is not None:
            self._synchronizer.close()

    def step_schedulers(self) -> None:
        """Let every learning rate scheduler make a step."""
        for scheduler in self._state.schedulers:
            scheduler.step()

    def _train_or_repeat(self, is_interrupted: Callable[[], bool]) -> _Outcome:
        """Compute the gradients of the step, in smaller microbatches as long as memory runs out."""
        state = self._state
        may_repeat = self._halve_microbatches or self._max_nonfinite_steps > 0
        snapshot = Snapshot(state.model, state.device) if may_repeat else None
        while True:
            if self._synchronizer is not None:
                self._synchronizer.begin_step()
            state.model.zero_grad(set_to_none=True)  # also the gradients that no optimizer uses
            outcome = self._agree(self._try_microbatches(), is_interrupted())
            if outcome.is_out_of_memory:
                assert snapshot is not None
                snapshot.restore()
                self._halve()
                continue
            if self._synchronizer is not None:
                self._synchronizer.finish()
            self._check_finite(outcome.loss, snapshot)
            return outcome

    def _try_microbatches(self) -> Tensor | None:
        """The mean loss of this rank's rows; None where memory ran out and the step may be repeated."""
        if not self._halve_microbatches:
            return self._train_microbatches()
        batch = self._state.batch
        try:
            return self._train_microbatches()
        except torch.OutOfMemoryError:
            if (self._state.device_train_microbatch_size or self._state.batch_num_samples) == 1:
                raise
        # Outside of the handler, as the error holds on to the tensors of the failed pass.
        self._state.batch, self._state.outputs, self._state.loss = batch, None, None
        self._state.model.zero_grad(set_to_none=True)
        if self._state.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _train_microbatches(self) -> Tensor:
        """Run forward and backward; the returned loss is the mean over this rank's rows."""
        state = self._state
        batch, size, whole = state.batch, state.device_train_microbatch_size, state.batch_num_samples
        # The ranks' gradients are averaged, so a rank with more rows than the mean counts for more.
        weight = whole * state.world_size / state.global_batch_num_samples
        if size is None or size >= whole:
            state.microbatch_start, state.microbatch_num_samples = 0, whole
            self._begin_last_backward()
            return self._train_microbatch(batch, share=weight)
        total = torch.zeros((), device=state.device)
        for start, microbatch in zip(range(0, whole, size), batches.split(batch, size), strict=True):
            state.microbatch_start = start
            state.microbatch_num_samples = min(size, whole - start)
            if start + size >= whole:
                self._begin_last_backward()
            share = state.microbatch_num_samples / whole
            total += share * self._train_microbatch(microbatch, share * weight)
        state.batch = batch
        return total

    def _begin_last_backward(self) -> None:
        # A step that may be repeated sends nothing before all ranks know that it need not be.
        if self._synchronizer is not None and not self._halve_microbatches:
            self._synchronizer.begin_last_backward()

    def _train_microbatch(self, microbatch: Any, share: float) -> Tensor:
        state, run_event = self._state, self._engine.run_event
        model: Any = state.model
        state.batch = microbatch
        with autocast(self._precision, state.device):
            run_event(Event.BEFORE_FORWARD)
            state.outputs = model(state.batch)
            run_event(Event.AFTER_FORWARD)
            run_event(Event.BEFORE_LOSS)
            state.loss = check_loss(model.loss(state.outputs, state.batch))
            run_event(Event.AFTER_LOSS)
        run_event(Event.BEFORE_BACKWARD)
        loss = state.loss if share == 1.0 else state.loss * share
        state.scaler.scale(loss).backward()
        run_event(Event.AFTER_BACKWARD)
        return state.loss.detach()

    def _agree(self, loss: Tensor | None, is_interrupted: bool) -> _Outcome:
        """Tell the other ranks how the step went, and hear how it went there."""
        state = self._state
        if state.world_size == 1:
            return _Outcome(torch.tensor(math.nan) if loss is None else loss, loss is None, is_interrupted)
        share = state.batch_num_samples / state.global_batch_num_samples
        own = [0.0 if loss is None else float(loss) * share, loss is None, is_interrupted]
        prints = [0.0] * state.world_size
        if self._synchronizer is not None and loss is not None:
            prints[state.rank] = self._synchronizer.fingerprint()
        mean, num_out_of_memory, num_interrupted, *prints = distributed.sum_over_ranks([*own, *prints])
        if not num_out_of_memory and len(set(prints)) > 1:
            others = [rank for rank, value in enumerate(prints) if value != prints[0]]
            raise RuntimeError(
                f"all ranks must use the same parameters in a step, but those of ranks {others} with gradients are not "
                f"those of rank 0 in step {state.timestamp.batch}; a model with branches of its own that differ over "
                "ranks needs find_unused_parameters=True"
            )
        return _Outcome(torch.tensor(mean), num_out_of_memory > 0, num_interrupted > 0)

    def _halve(self) -> None:
        """Go on in microbatches of half the size."""
        state = self._state
        largest = -(-state.global_batch_num_samples // state.world_size)  # the same on all ranks
        size = state.device_train_microbatch_size or largest
        state.device_train_microbatch_size = max(1, -(-min(size, largest) // 2))
        if state.rank == 0:
            size = state.device_train_microbatch_size
            _log.warning("out of memory: the step is repeated with device_train_microbatch_size=%d", size)

    def _check_finite(self, loss: Tensor, snapshot: Snapshot | None) -> None:
        """Leave out the update of a step whose loss is NaN or infinite, as long as that is allowed."""
        if math.isfinite(loss.item()):
            self._state.num_nonfinite_steps = 0
            return
        self._state.num_nonfinite_steps += 1
        self._state.model.zero_grad(set_to_none=True)
        step = self._state.timestamp.batch
        if snapshot is not None:
            snapshot.restore_buffers()
        if self._state.num_nonfinite_steps > self._max_nonfinite_steps:
            raise FloatingPointError(
                f"the loss of step {step} is {loss.item()}, and max_nonfinite_steps={self._max_nonfinite_steps} allows "
                f"for no more such steps in a row; parameters and optimizers are as they were before the step"
            )
        if self._state.rank == 0:
            _log.warning("the loss of step %d is %s: the step is left out", step, loss.item())

    def _unscale_gradients(self) -> None:
        if self._state.scaler.is_enabled():
            for optimizer in filter(_has_gradient, self._state.optimizers):
                self._state.scaler.unscale_(optimizer)

    def _step_optimizers(self) -> None:
        scaler = self._state.scaler
        had_gradient = False
        for optimizer in self._state.optimizers:
            # The loss scaler refuses an optimizer that got no gradient at all, as dropped blocks may leave it.
            if not scaler.is_enabled() or _has_gradient(optimizer):
                had_gradient = True
                scaler.step(optimizer)
        if had_gradient:
            scaler.update()


def _has_gradient(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
