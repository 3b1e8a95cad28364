"""Forward and backward passes of a step, in microbatches; the gradients are averaged over ranks."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine, Event, State
from . import distributed
from .data import batches
from .distributed.declarations import skippable_modules
from .distributed.parallelism import Synchronizer
from .loss import LossParts
from .precision import Precision, autocast
from .snapshot import Snapshot

_log = logging.getLogger(__name__)


class ForwardBackward:
    """Computes the gradients of the batch in the state, with all events from BEFORE_FORWARD to AFTER_BACKWARD.

    Args:
        engine: Runs the events.
        precision: Dtype of the forward pass.
        halve_microbatches: Whether to repeat passes that ran out of memory in microbatches of half the size.
        synchronizer: Averages the gradients over ranks; None in a single process.
    """

    def __init__(
        self, engine: Engine, *, precision: Precision, halve_microbatches: bool, synchronizer: Synchronizer | None
    ) -> None:
        self.parts = LossParts()  # of the latest passes
        self._engine = engine
        self._state = engine.state
        self._autocast = autocast(precision, engine.state.device)
        self._halve_microbatches = halve_microbatches
        self._synchronizer = synchronizer

    def __call__(self) -> tuple[Tensor, Snapshot]:
        """Compute the averaged gradients; repeat with smaller microbatches after out of memory.

        Returns:
            The mean loss over this rank's rows, detached, and a snapshot of the buffers from before the passes.
        """
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
        return loss, snapshot

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
        self.parts = LossParts()
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
            state.loss = self.parts.add(model.loss(state.outputs, state.batch), state.microbatch_num_samples)
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


def _may_skip_all(state: State) -> bool:
    """Whether a step may leave every parameter without a gradient, as when all trainable blocks are dropped."""
    has_trainable = any(parameter.requires_grad for parameter in state.model.parameters())
    may_skip = any(algorithm.find_unused_parameters for algorithm in state.algorithms)
    return has_trainable and (may_skip or bool(skippable_modules(state.model)))
