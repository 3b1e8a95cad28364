"""A step whose flags the host has not read yet."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine import State, Timestamp
from .flags import StepFlags
from .snapshot import Snapshot
from .torch_internals import discard_unscaled
from .update import remove_state


@dataclass
class PendingStep:
    """A step whose flags the host has not read yet, with what is needed to undo it.

    Args:
        flags: Flags of the step on the device.
        snapshot: Buffers before the step.
        timestamp: Timestamp before the step.
        states: Functions that restore the algorithms and callbacks, with their arguments, from `copy_states`.
        schedules: Schedulers and optimizers with their settings before the step, from `copy_schedules`.
        are_buffers_restored: Whether the device restores the buffers if the step is skipped.
        created: Parameters whose optimizer state the step created.
    """

    flags: StepFlags
    snapshot: Snapshot
    timestamp: Timestamp
    states: Sequence[tuple[Callable[[Any], Any], Any]] = ()
    schedules: Sequence[tuple[Any, Any]] = ()
    are_buffers_restored: bool = False
    created: Sequence[tuple[Optimizer, nn.Parameter]] = ()

    def restore_buffers_if_nonfinite(self) -> bool:
        """Restore the buffers on the device if the step is skipped; False if only the host can."""
        self.are_buffers_restored = self.snapshot.restore_buffers_where(self.flags.found_nonfinite)
        return self.are_buffers_restored

    def skip(self) -> None:
        """Restore buffers and optimizer states; the device has skipped the update already."""
        remove_state(self.created)
        if not self.are_buffers_restored:
            self.snapshot.restore_buffers()

    def undo(self, state: State) -> None:
        """Restore the run to its state before the step."""
        remove_state(self.created)
        self.snapshot.restore_buffers()
        state.model.zero_grad(set_to_none=True)
        discard_unscaled(state.scaler)
        for thing, saved in self.schedules:
            if isinstance(thing, Optimizer):
                for group, settings in zip(thing.param_groups, saved, strict=True):
                    group.update(settings)
            else:
                thing.load_state_dict(saved)
        for load, saved in self.states:
            load(saved)
        state.timestamp = self.timestamp

    def what_is_nonfinite(self) -> str:
        """Say for a message whether loss or gradients are not finite. Waits for the device."""
        loss = self.flags.loss.item()
        if math.isfinite(loss):
            return f"the gradients of step {self.timestamp.batch} are not finite, at a loss of {loss:g}"
        return f"the loss of step {self.timestamp.batch} is {loss}"


def copy_states(state: State) -> list[tuple[Callable[[Any], Any], Any]]:
    """The functions that restore the states of algorithms and callbacks, with copies of the states."""
    copies: list[tuple[Callable[[Any], Any], Any]] = []
    for algorithm in state.algorithms:
        if not algorithm.skips_nonfinite_steps:
            copies.append((algorithm.load_state_dict, _copied(algorithm.state_dict())))
            copies.append((algorithm.load_rank_state_dict, _copied(algorithm.rank_state_dict())))
    copies += [(callback.load_state_dict, _copied(callback.state_dict())) for callback in state.callbacks]
    return copies


def _copied(value: Any) -> Any:
    """A copy of nested containers and their tensors."""
    if isinstance(value, (float, int, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if type(value) is list else deepcopy(value)


def copy_schedules(state: State) -> Iterator[tuple[Any, Any]]:
    """The states of the schedulers, then the param_groups that they change, in the order of their restoration."""
    for scheduler in state.schedulers:
        yield scheduler, _copied(scheduler.state_dict())
    for optimizer in state.optimizers:
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        yield optimizer, _copied(groups)
