"""Exponential moving average (EMA) of the weights, which is evaluated in place of the weights that train."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...engine import Algorithm, Event, Logger, State, Time, TimeUnit, as_time
from ...engine.checks import check_number
from .torch_internals import move_together

_EVENTS = {TimeUnit.BATCH: Event.BATCH_END, TimeUnit.EPOCH: Event.EPOCH_END}


def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """Move the weights of `ema_model` towards those of `model`: ``ema = smoothing * ema + (1 - smoothing) * weight``.

    Floating-point buffers, such as the statistics of BatchNorm, are averaged too; other buffers are copied.

    Args:
        model: The model that trains.
        ema_model: A copy of it, as ``copy.deepcopy`` makes it, changed in place.
        smoothing: Weight of the past, in (0, 1).

    Raises:
        TypeError: If `smoothing` is not a number.
        ValueError: If it is out of range, or the models have different parameters or buffers.
    """
    check_smoothing(smoothing)
    own, averages = _all_tensors(model), _all_tensors(ema_model)
    if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in averages.items()}:
        raise ValueError("ema_model must have the parameters and buffers of model, as a deepcopy of it has")
    _move_towards(list(averages.values()), list(own.values()), smoothing)


def check_smoothing(smoothing: float) -> float:
    """Validate `smoothing`: a number in (0, 1)."""
    return check_number("smoothing", smoothing, gt=0, lt=1)


@dataclass(eq=False, repr=False)
class EMA(Algorithm):
    """Keeps an exponential moving average of the weights, and evaluates with it.

    The average begins as a copy of the weights at the first update, and moves at every further one by
    ``average = smoothing * average + (1 - smoothing) * weight``, with ``smoothing = 2 ** (-update_interval /
    half_life)``. Floating-point buffers are averaged too. A step that is skipped because its loss or gradients are not
    finite does not change the averages. From EVAL_START to EVAL_END the model has the averages;
    training continues with its own weights. The averages are part of checkpoints, once for all ranks.

    Args:
        half_life: After how long the weight of an old value in the average is one half, in batches or epochs. None
            if `smoothing` is given.
        smoothing: The weight of the old average at each update, in (0, 1), instead of `half_life`.
        ema_start: When the average begins, in epochs, batches, samples or as a fraction of the training.
        update_interval: How often the average is updated, in the unit of `half_life`; by default after every
            batch, or every epoch if `half_life` is in epochs.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If it is out of range, or both or none of `half_life` and `smoothing` are given.
    """

    half_life: str | Time | None = "1000ba"
    smoothing: float | None = None
    ema_start: str | Time = "0dur"
    update_interval: str | Time | None = None

    def __post_init__(self) -> None:
        if (self.half_life is None) == (self.smoothing is None):
            raise ValueError(
                f"one of half_life and smoothing must be given and the other be None, got {self.half_life!r} and "
                f"{self.smoothing!r}"
            )
        self._half_life = None if self.half_life is None else _check_period(self.half_life, "half_life")
        unit = TimeUnit.BATCH if self._half_life is None else self._half_life.unit
        interval = Time(1, unit) if self.update_interval is None else self.update_interval
        self._interval = _check_period(interval, "update_interval")
        self._start = as_time(self.ema_start, "ema_start")
        if self._start.unit.is_clock or self._start < 0 or (self._start.unit is TimeUnit.DURATION and self._start >= 1):
            raise ValueError(
                f'ema_start must not be negative, in epochs, batches, samples or a fraction below "1dur", got '
                f'"{self._start}"'
            )
        if self._half_life is None:
            assert self.smoothing is not None
            self._smoothing = check_smoothing(self.smoothing)
        elif self._half_life.unit is not self._interval.unit:
            raise ValueError(
                f'update_interval must be in the unit of half_life, got "{self._interval}" and "{self._half_life}"'
            )
        else:
            self._smoothing = 2 ** (-self._interval.value / self._half_life.value)
        self._parameters: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._first_skipped: Tensor | None = None  # until it is known whether the first update was skipped
        self._is_active = False  # whether the model has the averages, and this algorithm the weights that train

    @property
    def depends_on_duration(self) -> bool:
        """Whether the start is a fraction of the training."""
        return self._start.unit is TimeUnit.DURATION and bool(self._start)

    @property
    def skips_nonfinite_steps(self) -> bool:
        """The averages stay as they are in such a step."""
        return True

    def match(self, event: Event, state: State) -> bool:
        """When an update is due, and around evaluations as soon as there are averages."""
        if event is _EVENTS[self._interval.unit]:
            has_started = bool(self._parameters) or not self._start or state.progress(self._start) >= 1
            return has_started and state.timestamp.get(self._interval.unit).value % self._interval.value == 0
        if event is Event.EVAL_START:
            self._forget_skipped_beginning()
            return bool(self._parameters) and not self._is_active
        # At FIT_START it is active only if an evaluation before was interrupted.
        return self._is_active and (event is Event.EVAL_END or event is Event.FIT_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Update the averages, or exchange them with the weights of the model."""
        if event is _EVENTS[self._interval.unit]:
            # Epochs end after it is known on the host whether their last step was skipped.
            self._update(state.model, state.found_nonfinite if event is Event.BATCH_END else None)
        else:
            self._exchange(state.model)

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Copy the averages into a model, for example a deepcopy of the one that trains.

        Args:
            model: It is changed in place.

        Returns:
            `model` itself.

        Raises:
            RuntimeError: If there is no average yet, or an evaluation is running.
            ValueError: If `model` has other parameters or buffers.
        """
        if not self._parameters or self._is_active:
            raise RuntimeError("EMA has no average outside of an evaluation, or none yet: the first update makes it")
        with torch.no_grad():
            for average, tensor in self._pairs(model):
                tensor.copy_(average)
        return model

    def state_dict(self) -> dict[str, Any]:
        """The averages of the parameters, which are the same on all ranks."""
        self._forget_skipped_beginning()
        return {"averages": dict(self._parameters), "is_active": self._is_active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If it is something else.
        """
        if not isinstance(state["is_active"], bool):
            raise ValueError(f"is_active of EMA must be True or False, got {state['is_active']!r}")
        self._parameters, self._is_active = _check_tensors(state["averages"]), state["is_active"]
        self._first_skipped = None

    def rank_state_dict(self) -> dict[str, Any]:
        """The averages of the buffers, which differ as each rank's BatchNorm sees its own rows."""
        self._forget_skipped_beginning()
        return {"averages": dict(self._buffers)}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `rank_state_dict` returned.

        Raises:
            ValueError: If it is something else.
        """
        self._buffers = _check_tensors(state["averages"])

    def _update(self, model: nn.Module, is_skipped: Tensor | None) -> None:
        """Move the averages, unless the device finds that the step is skipped."""
        self._forget_skipped_beginning()
        if not self._parameters:
            self._parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            self._buffers = {name: tensor.detach().clone() for name, tensor in _buffers(model).items()}
            self._first_skipped = is_skipped
            return
        averages, tensors = zip(*self._pairs(model), strict=True)
        if is_skipped is not None:  # the buffers may be restored later, the parameters were not changed
            kept = [torch.where(is_skipped != 0, average, tensor) for average, tensor in self._buffer_pairs(model)]
            tensors = (*tensors[: len(tensors) - len(kept)], *kept)
        _move_towards(averages, tensors, self._smoothing, is_skipped)

    def _forget_skipped_beginning(self) -> None:
        """Drop the averages if the step of the first update was skipped, which the host knows by the next step."""
        first, self._first_skipped = self._first_skipped, None
        if first is not None and first.item():
            self._parameters, self._buffers = {}, {}

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for average, tensor in self._pairs(model):
            before = tensor.detach().clone()
            tensor.copy_(average)
            average.copy_(before)
        self._is_active = not self._is_active

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Each average with the tensor of the model: first all parameters, then all buffers."""
        return [*_match(self._parameters, dict(model.named_parameters())), *self._buffer_pairs(model)]

    def _buffer_pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        return _match(self._buffers, _buffers(model))


def _match(averages: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    if {name: tensor.shape for name, tensor in averages.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError("the model must have the parameters and buffers that EMA has averaged")
    for name, average in averages.items():
        if average.device != tensors[name].device:  # it was loaded to the CPU
            averages[name] = average.to(tensors[name].device)
    return [(averages[name], tensor) for name, tensor in tensors.items()]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _move_towards(
    averages: Sequence[Tensor], tensors: Sequence[Tensor], smoothing: float, is_skipped: Tensor | None = None
) -> None:
    """Update averages in place, those of one dtype, sharded or not, together; other dtypes than floats are copied.

    Args:
        averages: Changed in place.
        tensors: What they move towards.
        smoothing: Weight of the averages.
        is_skipped: Scalar on the device: if it is 1, the averages stay as they are.
    """
    groups: dict[tuple[torch.dtype, type], tuple[list[Tensor], list[Tensor]]] = {}
    for average, tensor in zip(averages, tensors, strict=True):
        if average.is_floating_point():
            average = average.detach()
            group = groups.setdefault((average.dtype, type(average)), ([], []))
            group[0].append(average)
            group[1].append(tensor.detach())
        else:
            average.copy_(tensor)
    update = get_ema_multi_avg_fn(smoothing)
    for group in groups.values():
        if is_skipped is None:
            update(*group, None)
        else:
            own, moved = ([_local(tensor) for tensor in part] for part in group)
            move_together(own, moved, (1 - smoothing) * (1 - is_skipped))


def _local(tensor: Tensor) -> Tensor:
    """The shard of a tensor on this rank, or the tensor itself."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def _check_period(value: str | Time, name: str) -> Time:
    time = as_time(value, name)
    if time.unit not in _EVENTS or time <= 0 or time.value == math.inf:
        raise ValueError(f'{name} must be positive and in batches or epochs, got "{time}"')
    return time


def _check_tensors(tensors: Any) -> dict[str, Tensor]:
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError("the averages of EMA must be tensors by name")
    return dict(tensors)
