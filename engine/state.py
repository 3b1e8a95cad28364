"""The state of a training run, for algorithms and callbacks to read and change."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .algorithm import Algorithm
from .callback import Callback
from .evaluator import Evaluator
from .progress import Progress
from .time import Time, TimeUnit


def _refuse_to_recompute() -> None:
    raise RuntimeError("recompute_gradients needs a Trainer, whose step has gradients to compute again")


@dataclass(kw_only=True)
class State(Progress):
    """The state of a run, updated by the Trainer.

    `timestamp`, `eval_metrics` and the other counters of the progress are documented at `Progress`.

    Args:
        model: The network that is trained.
        max_duration: When training ends, in epochs, batches or samples; None for evaluation only.
        train_dataloader: Yields the batches of an epoch.
        eval_dataloader: Yields the batches of an evaluation; of several sets the one that is evaluated, or the first.
        evaluators: All sets of evaluation data.
        optimizers: The optimizers, stepped once per batch.
        schedulers: The learning rate schedulers of torch.
        schedules: Learning rate schedules: functions of the state that give a factor of the initial learning rate.
        algorithms: The algorithms, in order.
        callbacks: The callbacks, in order.
        device: The device of the model.
        scaler: Scales the loss of fp16 training; disabled for other precisions.
        precision: Of the forward pass: ``"fp32"``, ``"amp_bf16"`` or ``"amp_fp16"``.
        train_subset_num_batches: How many batches of each epoch are trained on; None for all.
        eval_subset_num_batches: How many batches of each evaluation are read; None for all.
        seed: The seed of the run, the same on all ranks.
        rank: Rank of this process, from 0.
        world_size: Number of processes of the run.
        dataloader_label: Which data is read: ``"train"``, the label of an evaluation set, which is ``"eval"`` by
            default, ``"predict"``, or None outside of all loops.
        batch: The current batch or microbatch, on the device.
        batch_fingerprint: A hash, below 2**32, of the samples of the batch over all ranks; 0 if unknown.
        batch_num_samples: Rows of the whole batch of this step, on this rank.
        global_batch_num_samples: The same over all ranks.
        microbatch_start: Row of the batch at which the current microbatch begins.
        microbatch_num_samples: Rows of the current microbatch.
        outputs: The outputs of the model for `batch`.
        loss: The loss of `outputs`, before it is scaled for accumulation.
        train_metrics: The training metrics of the latest epoch: numbers, and tensors on the CPU for metrics that are
            no numbers.
        settings: The settings of the run, as plain values.
        is_stopped: Whether `stop_training` was called.
        found_nonfinite: float32 scalar on the device, set before the update of each step: 1 if the update is skipped
            because loss or gradients are not finite, else 0. None before the first step.
        settle: Waits until it is known whether the latest step was finite, and raises if it was not and may not be
            skipped. Must be called before weights are saved or evaluated.
        recompute_gradients: For an algorithm that needs gradients at other weights than those of the step. At
            AFTER_TRAIN_BATCH, where the gradients are complete, the algorithm may change the weights in place and call
            it. It clears the gradients and runs the forward and backward passes of the step again with the events from
            BEFORE_FORWARD to AFTER_BACKWARD: on the same batch, with the same drop plan, in microbatches if the step
            has some, averaged over ranks. Losses and gradients of both passes must be finite. Dropout masks are drawn
            anew, and BatchNorm updates its statistics in both. `outputs` and `loss` stay those of the first pass. The
            algorithm restores the weights itself, also if an exception is raised. Not with ``amp_fp16``.
    """

    model: nn.Module
    max_duration: Time | None = None
    train_dataloader: Iterable[Any] | None = None
    eval_dataloader: Iterable[Any] | None = None
    evaluators: Sequence[Evaluator] = ()
    optimizers: Sequence[Optimizer] = ()
    schedulers: Sequence[LRScheduler] = ()
    schedules: "Sequence[Callable[[State], float]]" = ()
    algorithms: Sequence[Algorithm] = ()
    callbacks: Sequence[Callback] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    precision: str = "fp32"
    train_subset_num_batches: int | None = None
    eval_subset_num_batches: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    dataloader_label: str | None = None
    batch: Any = None
    batch_fingerprint: int = 0
    batch_num_samples: int = 0
    global_batch_num_samples: int = 0
    microbatch_start: int = 0
    microbatch_num_samples: int = 0
    outputs: Any = None
    loss: Tensor | None = None
    train_metrics: dict[str, float | Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    is_stopped: bool = False
    found_nonfinite: Tensor | None = field(default=None, repr=False)
    settle: Callable[[], None] = field(default=lambda: None, repr=False)
    recompute_gradients: Callable[[], None] = field(default=_refuse_to_recompute, repr=False)

    @property
    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch trains on, which may be an estimate; None if the dataloader has no length."""
        return _length(self.train_dataloader, self.train_subset_num_batches)

    @property
    def dataloader(self) -> Iterable[Any] | None:
        """The dataloader that `dataloader_label` names; None outside of training and evaluation."""
        if self.dataloader_label in (None, "predict"):
            return None
        return self.train_dataloader if self.dataloader_label == "train" else self.eval_dataloader

    @property
    def dataloader_len(self) -> Time | None:
        """The length of the dataloader that `dataloader_label` names, in batches; None if it has none."""
        if self.dataloader_label in (None, "predict"):
            return None
        is_eval = self.dataloader_label != "train"
        length = _length(self.eval_dataloader, self.eval_subset_num_batches) if is_eval else self.batches_per_epoch
        return None if length is None else Time(length, TimeUnit.BATCH)

    @property
    def is_finished(self) -> bool:
        """Whether `max_duration` is reached or the training was stopped."""
        if self.is_stopped:
            return True
        assert self.max_duration is not None, "only a state that trains can be asked"
        unit, timestamp = self.max_duration.unit, self.timestamp
        done = (
            timestamp.epoch
            if unit is TimeUnit.EPOCH
            else timestamp.batch
            if unit is TimeUnit.BATCH
            else timestamp.sample
        )
        return int(done) >= self.max_duration.value

    def stop_training(self) -> None:
        """End the training after the current batch, with the evaluation and the events of the end of training."""
        self.is_stopped = True

    def count_intervals(self, interval: Time) -> int:
        """How many whole intervals are finished.

        Args:
            interval: Positive; in epochs, batches, samples or ``dur``.
        """
        if interval.unit is TimeUnit.DURATION:
            return int(self.get_elapsed_duration().value / interval.value + 1e-9)  # 0.3 / 0.1 is a little under 3
        return int(self.timestamp.get(interval.unit).value // interval.value)

    def batch_get_item(self, key: Any) -> Any:
        """A part of `batch`.

        Args:
            key: An index of a sequence, a key of a mapping, the name of an attribute, or two functions: of the batch
                for its part, and of the batch and a value for the batch with this part.
        """
        if isinstance(key, tuple):
            return key[0](self.batch)
        is_attribute = isinstance(key, str) and not isinstance(self.batch, Mapping)
        return getattr(self.batch, key) if is_attribute else self.batch[key]

    def batch_set_item(self, key: Any, value: Any) -> None:
        """Replace a part of `batch`, in a copy of its container: the dataloader may hold the container itself.

        Args:
            key: As in `batch_get_item`.
            value: What replaces the part.
        """
        self.batch = key[1](self.batch, value) if isinstance(key, tuple) else _replaced(self.batch, key, value)

    def get_elapsed_duration(self) -> Time:
        """The finished fraction of the training, in ``dur``, to the batch."""
        return Time(self.progress(Time(1.0, TimeUnit.DURATION)), TimeUnit.DURATION)

    def progress(self, span: Time) -> float:
        """What is finished, as a fraction of `span`.

        It increases with every batch, in any unit, and is exactly 1.0 at the end of `span`: it is one division
        of integers, so rounding errors do not accumulate.

        Args:
            span: A positive time, counted from the start of training.

        Raises:
            ValueError: If `span` is counted in epochs and the dataloader has no length, in ``dur``
                and there is no `max_duration`, or in wall-clock time.
        """
        _refuse_clock(span, "span")
        if span.unit is TimeUnit.DURATION:
            if self.max_duration is None:
                raise ValueError(f'"{span}" needs a max_duration, got None')
            return self.progress(self.max_duration) / span.value
        if span.unit is not TimeUnit.EPOCH:
            return self.timestamp.get(span.unit).value / span.value
        if self.batches_per_epoch is None:
            raise ValueError(f'"{span}" needs a train_dataloader with a length, this one has none')
        in_epoch = min(self.timestamp.batch_in_epoch, self.batches_per_epoch)  # whose length may be an estimate
        batches = self.timestamp.epoch * self.batches_per_epoch + in_epoch
        return batches / (span.value * self.batches_per_epoch)

    def in_epochs(self, time: Time) -> float | None:
        """Convert a time to epochs, None if the dataloader has no length.

        Samples are converted by the number of samples in an epoch.

        Raises:
            ValueError: If `time` is wall-clock time.
        """
        _refuse_clock(time, "time")
        if time.unit is TimeUnit.EPOCH:
            return time.value
        if time.unit is TimeUnit.DURATION:
            whole = None if self.max_duration is None else self.in_epochs(self.max_duration)
            return None if whole is None else time.value * whole
        batches = self.batches_per_epoch
        if time.unit is TimeUnit.BATCH:
            return time.value / batches if batches else None
        samples = self._samples_per_epoch()
        return time.value / samples if samples else None

    def _samples_per_epoch(self) -> int | None:
        batch_size = getattr(self.train_dataloader, "batch_size", None)
        sampler = getattr(self.train_dataloader, "sampler", None)
        if batch_size is None or self.batches_per_epoch is None:
            return None
        if getattr(self.train_dataloader, "drop_last", False) or not hasattr(sampler, "__len__"):
            return self.batches_per_epoch * batch_size
        return min(len(sampler), self.batches_per_epoch * batch_size)  # type: ignore[arg-type]  # it has a length


def _length(dataloader: Any, most: int | None) -> int | None:
    try:
        length = len(dataloader)
    except TypeError:
        return most
    return length if most is None else min(length, most)


def _replaced(batch: Any, key: Any, value: Any) -> Any:
    """A copy of the outermost container of a batch with one part replaced."""
    if isinstance(batch, tuple):
        if isinstance(key, str):
            return batch._replace(**{key: value})  # type: ignore[attr-defined]  # a named tuple
        parts = list(batch)
        parts[key] = value
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    batch = copy(batch)
    if isinstance(key, str) and not isinstance(batch, Mapping):
        setattr(batch, key, value)
    else:
        batch[key] = value
    return batch


def _refuse_clock(time: Time, name: str) -> None:
    if time.unit.is_clock:
        raise ValueError(
            f'{name} must be in epochs, batches, samples or a fraction of training ("ep", "ba", "sp", "dur"), since a '
            f'timestamp does not count wall-clock time, got "{time}"'
        )
