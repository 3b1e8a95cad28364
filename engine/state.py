"""What a training run is made of at this moment: data for algorithms and callbacks to read and change."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .algorithm import Algorithm
from .callback import Callback
from .time import Time, Timestamp, TimeUnit


@dataclass(kw_only=True)
class State:
    """The state of a run. The trainer keeps it up to date; its methods compute and never act.

    Args:
        model: The network that trains.
        max_duration: When training ends, in epochs, batches or samples; None where nothing trains.
        train_dataloader: Yields the batches of an epoch.
        eval_dataloader: Yields the batches of an evaluation.
        optimizers: The optimizers, stepped once per batch.
        schedulers: The learning rate schedulers.
        algorithms: What changes training, in order.
        callbacks: What watches it, in order.
        device: Where the model is.
        scaler: Scales the loss of fp16 training; it passes everything on where it is not enabled.
        device_train_microbatch_size: Rows per forward and backward pass; None for the whole batch.
        seed: The seed of the run, the same on all ranks.
        rank: Number of this process among `world_size`.
        world_size: Number of processes that train together.
        timestamp: What is finished.
        batch: The batch or microbatch at hand, on the device.
        batch_fingerprint: A hash, below 2**32, of which samples the batch holds over all ranks; 0 if not known.
        batch_num_samples: Rows of the whole batch of this step, on this rank.
        global_batch_num_samples: The same over all ranks.
        microbatch_start: Row of the batch at which the microbatch at hand begins.
        microbatch_num_samples: Rows of the microbatch at hand.
        outputs: What the model made of `batch`.
        loss: The loss of `outputs`, before it is scaled for accumulation.
        num_nonfinite_steps: How many steps in a row were skipped because loss or gradients were not finite; up to
            the latest step after `settle`.
        eval_metrics: Results of the latest evaluation by name.
        evaluated_at: Number of batches that were finished at the latest evaluation, -1 before the first.
        settings: What the run was started with, as plain values.
        is_stopped: Whether `stop_training` was called.
        settle: Waits until it is known whether the latest step was finite, and raises if it was not and must not be
            skipped. What saves or judges the weights calls it first.
    """

    model: nn.Module
    max_duration: Time | None = None
    train_dataloader: Iterable[Any] | None = None
    eval_dataloader: Iterable[Any] | None = None
    optimizers: Sequence[Optimizer] = ()
    schedulers: Sequence[LRScheduler] = ()
    algorithms: Sequence[Algorithm] = ()
    callbacks: Sequence[Callback] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    device_train_microbatch_size: int | None = None
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    timestamp: Timestamp = field(default_factory=Timestamp)
    batch: Any = None
    batch_fingerprint: int = 0
    batch_num_samples: int = 0
    global_batch_num_samples: int = 0
    microbatch_start: int = 0
    microbatch_num_samples: int = 0
    outputs: Any = None
    loss: Tensor | None = None
    num_nonfinite_steps: int = 0
    eval_metrics: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    settings: dict[str, Any] = field(default_factory=dict)
    is_stopped: bool = False
    settle: Callable[[], None] = field(default=lambda: None, repr=False)

    @property
    def batches_per_epoch(self) -> int | None:
        """The length of the training dataloader, None where it has none."""
        try:
            return len(self.train_dataloader)  # type: ignore[arg-type]  # TypeError is the answer
        except TypeError:
            return None

    @property
    def is_finished(self) -> bool:
        """Whether `max_duration` is reached, or the training was stopped before."""
        if self.is_stopped:
            return True
        assert self.max_duration is not None, "only a state that trains can be asked"
        return self.timestamp.get(self.max_duration.unit) >= self.max_duration

    @property
    def is_at_end_of_epoch(self) -> bool:
        """Whether all batches of the running epoch are finished; False where its length is not known."""
        return self.timestamp.batch_in_epoch == self.batches_per_epoch

    def stop_training(self) -> None:
        """End the training after the current batch, with the evaluation and the events of the end of training."""
        self.is_stopped = True

    def get_elapsed_duration(self) -> Time:
        """The finished fraction of the training, in ``dur``, to the batch."""
        return Time(self.progress(Time(1.0, TimeUnit.DURATION)), TimeUnit.DURATION)

    def progress(self, span: Time) -> float:
        """What is finished, as a fraction of `span`.

        It moves with every batch, in any unit, and is exactly 1.0 at the end of `span`: one division
        of whole numbers gives it, so there is nothing to round on the way.

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
        batches = self.timestamp.epoch * self.batches_per_epoch + self.timestamp.batch_in_epoch
        return batches / (span.value * self.batches_per_epoch)

    def in_epochs(self, time: Time) -> float | None:
        """Convert a time to epochs, None where the dataloader does not tell its length.

        Samples are converted by the dataset's share that one epoch reads.

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
        return len(sampler)  # type: ignore[arg-type]  # just seen to have a length


def _refuse_clock(time: Time, name: str) -> None:
    if time.unit.is_clock:
        raise ValueError(
            f'{name} must be in epochs, batches, samples or a fraction of training ("ep", "ba", "sp", "dur"), since no '
            f'timestamp tells wall-clock time, got "{time}"'
        )
