"""Refuses what cannot train, before anything is done. Every message names the argument, the rule and the value."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..engine import Time, TimeUnit, as_time

T = TypeVar("T")


def check_model(model: Any) -> nn.Module:
    """A model must be an ``nn.Module`` with ``loss(outputs, batch)``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    if not callable(getattr(model, "loss", None)):
        raise TypeError(
            f"model must have a method loss(outputs, batch), {type(model).__name__} has none; for a classifier of "
            f"(inputs, targets) wrap it: model = etude.models.ComposerClassifier(model, num_classes=10)"
        )
    return model


def check_dataloader(dataloader: Any, name: str) -> Iterable[Any] | None:
    """A dataloader must be iterable and, where it tells its length, not empty."""
    if dataloader is None:
        return None
    if not isinstance(dataloader, Iterable):
        raise TypeError(f"{name} must be an iterable of batches, got {dataloader!r}")
    try:
        length = len(dataloader)  # type: ignore[arg-type]  # TypeError is an answer
    except TypeError:
        return dataloader
    if length == 0:
        raise ValueError(f"{name} must yield at least one batch, its length is 0")
    return dataloader


def check_duration(max_duration: str | Time | None, train_dataloader: Any) -> Time | None:
    """A duration must be positive and come together with the data to train on."""
    if max_duration is None and train_dataloader is None:
        return None
    if train_dataloader is None:
        raise ValueError(f'train_dataloader must be given to train for max_duration="{max_duration}", got None')
    if max_duration is None:
        raise ValueError('max_duration must be given with train_dataloader, for example "3ep", got None')
    duration = as_time(max_duration, "max_duration")
    if duration.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE):
        raise ValueError(f'max_duration must be in epochs, batches or samples ("ep", "ba", "sp"), got "{duration}"')
    if duration <= 0:
        raise ValueError(f'max_duration must be positive, got "{duration}"')
    return duration


def check_interval(interval: str | Time | None, eval_dataloader: Any) -> Time:
    """An evaluation interval must be positive, in epochs or batches, and have data to evaluate on."""
    if interval is None:
        return Time(1, TimeUnit.EPOCH)
    if eval_dataloader is None:
        raise ValueError(f'eval_interval must come with an eval_dataloader to have an effect, got "{interval}"')
    time = as_time(interval, "eval_interval")
    if time.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH) or time <= 0:
        raise ValueError(f'eval_interval must be positive and in epochs or batches, got "{time}"')
    return time


def check_microbatch_size(size: Any) -> int | None:
    """A microbatch has at least one row; ``"auto"`` begins with the whole batch."""
    if size == "auto":
        return None
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"device_train_microbatch_size must be a whole number of at least 1, or 'auto', got {size!r}")
    return size


def check_seed(seed: int) -> int:
    """A seed is a whole number that every generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, got {seed!r}")
    return seed


def check_device(device: str | torch.device | None) -> torch.device:
    """A device must be there; None is the GPU where there is one; ``"gpu"`` is another word for ``"cuda"``."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device("cuda" if device == "gpu" else device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be "cpu", "gpu" or a torch device, got {device!r}') from None
    try:
        if found.type == "meta":
            raise RuntimeError("a meta device holds no data")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be available on this machine, got {device!r}") from error
    return found


def as_sequence(value: Any, kind: type[T], name: str) -> tuple[T, ...]:
    """One object of a kind, or a sequence of them, as a tuple."""
    values: Sequence[Any] = () if value is None else (value,) if isinstance(value, kind) else value
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name} must be {kind.__name__} objects, got {value!r}")
    for item in values:
        if not isinstance(item, kind):
            raise TypeError(f"{name} must be {kind.__name__} objects, got {item!r}")
    return tuple(values)


def check_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Every parameter of an optimizer must be one of the model."""
    known = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        strangers = sum(id(parameter) not in known for parameter in parameters)
        if strangers:
            raise ValueError(
                f"optimizers must hold parameters of the model only, {type(optimizer).__name__} holds {strangers} of "
                f"{len(parameters)} that are not among those of {type(model).__name__}"
            )


def check_steps(optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler]) -> None:
    """Optimizers and schedulers must step without being handed anything."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError("optimizers must step without a closure, got LBFGS, which needs one")
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("schedulers must step without a metric, got ReduceLROnPlateau, which needs one")


def check_schedulers(schedulers: Sequence[LRScheduler], optimizers: Sequence[Optimizer]) -> None:
    """Every scheduler must drive one of the optimizers."""
    for scheduler in schedulers:
        if all(scheduler.optimizer is not optimizer for optimizer in optimizers):
            raise ValueError(
                f"schedulers must drive one of the optimizers, {type(scheduler).__name__} drives another "
                f"{type(scheduler.optimizer).__name__}"
            )


def check_run_name(run_name: str) -> str:
    """A run's name must be one plain folder name, so that it cannot lead out of ``runs``."""
    if not isinstance(run_name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", run_name, re.ASCII):
        raise ValueError(
            f"run_name must be letters, digits and . _ + -, and start with a letter or digit, got {run_name!r}"
        )
    return run_name


def check_save_interval(interval: str | Time | None, save_folder: Any) -> Time:
    """An interval between checkpoints must be positive, in any unit, and have a folder to save to."""
    if interval is None:
        return Time(1, TimeUnit.EPOCH)
    if save_folder is None:
        raise ValueError(f'save_interval must come with a save_folder to have an effect, got "{interval}"')
    time = as_time(interval, "save_interval")
    if time <= 0:
        raise ValueError(f'save_interval must be positive, got "{time}"')
    if time.unit is TimeUnit.DURATION and time > 1:
        raise ValueError(f'save_interval must be at most "1dur", the whole training, got "{time}"')
    return time


def check_timeout(seconds: float) -> float:
    """A timeout is a positive number of seconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"dist_timeout must be a positive number of seconds, got {seconds!r}")
    return seconds


def check_nonfinite_steps(count: int) -> int:
    """A bound on steps is a whole number."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"max_nonfinite_steps must be a whole number of at least 0, got {count!r}")
    return count


def check_num_checkpoints_to_keep(count: int | None, save_folder: Any) -> int:
    """A number of checkpoints needs a folder to keep them in; None is 3."""
    if count is not None and save_folder is None:
        raise ValueError(f"save_num_checkpoints_to_keep must come with a save_folder to have an effect, got {count!r}")
    return 3 if count is None else count


def check_loading(load_path: Any, load_weights_only: bool) -> None:
    """Where the weights come from must be said."""
    if load_weights_only and load_path is None:
        raise ValueError("load_weights_only must come with a load_path to have an effect, got none")


def check_is_bare(model: nn.Module) -> None:
    """The Trainer makes the training parallel itself, block by block; a wrapper would do it a second time."""
    for module in model.modules():
        if type(module).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"model must not be wrapped for parallel training, as the Trainer does that itself under torchrun, got "
                f"a {type(module).__name__}"
            )


def check_loss(loss: Any) -> Tensor:
    """A loss must be a tensor without dimensions, or it is a ValueError."""
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"model.loss must return a tensor without dimensions, the mean over the batch; got {what}")
    return loss
