"""Checks of the arguments of a Trainer. Functions of ``(name, value)`` return the checked, converted value."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..engine import Evaluator, State, Time, TimeUnit, as_time, attached_algorithms
from ..engine.checks import check_int, check_number

T = TypeVar("T")


def check_model(name: str, model: Any) -> nn.Module:
    """Check that a model is an ``nn.Module`` with ``loss(outputs, batch)``, not wrapped for parallel training."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {model!r}")
    if not callable(getattr(model, "loss", None)):
        raise TypeError(
            f"{name} must have a method loss(outputs, batch), {type(model).__name__} has none; for a classifier of "
            f"(inputs, targets) wrap it: model = etude.models.ComposerClassifier(model, num_classes=10)"
        )
    for module in model.modules():
        if type(module).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"{name} must not be wrapped for parallel training, as the Trainer does that itself under torchrun, "
                f"got a {type(module).__name__}"
            )
    return model


def check_attached(state: State) -> None:
    """Check that all algorithms that are attached to the model take part in the run.

    Raises:
        RuntimeError: If one was attached after INIT, as by ``cf.apply_stochastic_depth`` in a callback.
    """
    for algorithm in attached_algorithms(state.model):
        if not any(algorithm is other for other in state.algorithms):
            name = type(algorithm).__name__
            raise RuntimeError(
                f"the functional form of {name} must be applied before the Trainer is built, or at INIT, to be part of "
                "its settings and checkpoints, got a model to which it was applied later"
            )


def check_dataloader(name: str, dataloader: Any) -> Iterable[Any]:
    """Check that a dataloader is iterable and not empty, as far as its length is known."""
    if not isinstance(dataloader, Iterable):
        raise TypeError(f"{name} must be an iterable of batches, got {dataloader!r}")
    if isinstance(dataloader, (str, bytes, Mapping, Tensor)):
        raise TypeError(f"{name} must be an iterable of batches, got a {type(dataloader).__name__}")
    if isinstance(dataloader, (list, tuple)) and any(
        isinstance(item, torch.utils.data.DataLoader) for item in dataloader
    ):
        raise TypeError(f"{name} must be one dataloader, got a {type(dataloader).__name__} of several")
    try:
        length = len(dataloader)  # type: ignore[arg-type]  # raises a TypeError without a length
    except TypeError:
        return dataloader
    if length == 0:
        raise ValueError(f"{name} must yield at least one batch, its length is 0")
    return dataloader


def check_duration(name: str, duration: Any) -> Time:
    """Convert a duration in epochs, batches or samples, above 0; an int counts epochs."""
    time = as_time(duration, name, TimeUnit.EPOCH)
    if time.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE):
        raise ValueError(f'{name} must be in epochs, batches or samples ("ep", "ba", "sp"), got "{time}"')
    if time <= 0:
        raise ValueError(f'{name} must be positive, got "{time}"')
    return time


def check_eval_interval(name: str, interval: Any) -> Time:
    """Convert an evaluation interval, at least 0, in any unit but wall-clock time. None is ``"1ep"``."""
    if interval is None:
        return Time(1, TimeUnit.EPOCH)
    time = as_time(interval, name, TimeUnit.EPOCH)
    if time.unit.is_clock or time < 0:
        raise ValueError(
            f'{name} must be at least 0 and in epochs, batches, samples or a fraction of training ("ep", "ba", "sp", '
            f'"dur"), got "{time}"'
        )
    if time.unit is TimeUnit.DURATION and time > 1:
        raise ValueError(f'{name} must be at most "1dur", the whole training, got "{time}"')
    return time


def check_subset(name: str, count: Any) -> int | None:
    """Check a number of batches; None and -1 mean all."""
    return None if count in (None, -1) else check_int(name, count, ge=1, alternative="-1 for all")


def check_save_interval(name: str, interval: Any) -> Time:
    """Convert an interval between checkpoints, above 0, in any unit. None is ``"1ep"``."""
    if interval is None:
        return Time(1, TimeUnit.EPOCH)
    time = as_time(interval, name)
    if time <= 0:
        raise ValueError(f'{name} must be positive, got "{time}"')
    if time.unit is TimeUnit.DURATION and time > 1:
        raise ValueError(f'{name} must be at most "1dur", the whole training, got "{time}"')
    return time


def check_num_to_keep(name: str, count: Any) -> int:
    """Check a number of checkpoints; -1 means all. None is 3."""
    if count is None:
        return 3
    return -1 if count == -1 else check_int(name, count, ge=1, alternative="-1 for all")


def check_microbatch_size(name: str, size: Any) -> Any:
    """Check a microbatch size; ``"auto"`` and None are allowed."""
    return size if size in (None, "auto") else check_int(name, size, ge=1, alternative='"auto"')


def check_seed(name: str, seed: Any) -> int:
    """Check a seed: an int in [0, 2**32), the range of NumPy's generator."""
    return check_int(name, seed, ge=0, lt=2**32)


def check_steps(name: str, count: Any) -> int:
    """Check a number of steps: an int >= 0."""
    return check_int(name, count, ge=0)


def check_timeout(name: str, seconds: Any) -> float:
    """Check a timeout: a number of seconds above 0."""
    return check_number(name, seconds, gt=0)


def check_bool(name: str, value: Any) -> bool:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Check that a value is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_device(name: str, device: Any) -> torch.device:
    """Convert a device and check that it is available. None is the GPU if there is one; ``"gpu"`` is ``"cuda"``."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device("cuda" if device == "gpu" else device)
    except (RuntimeError, TypeError):
        raise ValueError(f'{name} must be "cpu", "gpu" or a torch device, got {device!r}') from None
    try:
        if found.type == "meta":
            raise RuntimeError("a meta device holds no data")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{name} must be available on this machine, got {device!r}") from error
    return found


def check_run_name(name: str, run_name: Any) -> str:
    """Check that a run name is a plain folder name, so that its path stays inside ``runs``."""
    if not isinstance(run_name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", run_name, re.ASCII):
        raise ValueError(
            f"{name} must be letters, digits and . _ + -, and start with a letter or digit, got {run_name!r}"
        )
    return run_name


def check_folder(name: str, folder: Any) -> Path:
    """Convert a local path to an absolute one, which later changes of the working directory do not affect."""
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise TypeError(f"{name} must be a path, got {folder!r}")
    if "://" in str(folder) or "{" in str(folder):
        raise ValueError(f"{name} must be a plain path on this machine, without a protocol or braces, got {folder!r}")
    return Path(folder).absolute()


def check_path(name: str, path: Any) -> Path:
    """Convert a path to read from to an absolute one."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{name} must be a path, got {path!r}")
    return Path(path).absolute()


def as_sequence(name: str, value: Any, kind: type[T]) -> tuple[T, ...]:
    """Convert one object of type `kind`, or a sequence of them, to a tuple."""
    values: Sequence[Any] = () if value is None else (value,) if isinstance(value, kind) else value
    if not isinstance(values, (tuple, list)):
        raise TypeError(f"{name} must be {kind.__name__} objects, got {value!r}")
    for item in values:
        if not isinstance(item, kind):
            raise TypeError(f"{name} must be {kind.__name__} objects, got {item!r}")
    return tuple(values)


def check_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Check that optimizers hold only parameters of the model, and step without a closure."""
    known = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "optimizers must step without a closure, got LBFGS, which needs one; SGD or AdamW, for example, do"
            )
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        num_unknown = sum(id(parameter) not in known for parameter in parameters)
        if num_unknown:
            raise ValueError(
                f"optimizers must hold parameters of the model only, {type(optimizer).__name__} holds {num_unknown} of "
                f"{len(parameters)} that are not among those of {type(model).__name__}"
            )


def as_evaluators(name: str, value: Any) -> tuple[Evaluator, ...]:
    """Convert a dataloader, a dictionary of names to dataloaders, or `Evaluator` objects to a tuple of evaluators."""
    if isinstance(value, Evaluator):
        evaluators = [value]
    elif isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{name} must be at least one dataloader, got an empty dictionary")
        evaluators = [Evaluator(label=label, dataloader=dataloader) for label, dataloader in value.items()]
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Evaluator) for item in value):
        evaluators = list(value)
    else:
        evaluators = [] if value is None else [Evaluator(label="eval", dataloader=check_dataloader(name, value))]
    for evaluator in evaluators:
        check_dataloader(name if evaluator.label == "eval" else f"{name} {evaluator.label!r}", evaluator.dataloader)
    labels = [evaluator.label for evaluator in evaluators]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{name} must have a different label for each dataloader, got {twice[0]!r} twice")
    return tuple(evaluators)


def as_schedulers(name: str, value: Any) -> tuple[LRScheduler | Callable[[Any], float], ...]:
    """Check schedulers: either torch's, or functions of the state, as both would set the same learning rates."""
    values = () if value is None else value if isinstance(value, (tuple, list)) else (value,)
    for item in values:
        if not isinstance(item, LRScheduler) and (isinstance(item, type) or not callable(item)):
            raise TypeError(f"{name} must be LRScheduler objects or functions of the state, got {item!r}")
    if len({isinstance(item, LRScheduler) for item in values}) > 1:
        raise ValueError(f"{name} must be either LRScheduler objects or functions of the state, got both")
    return tuple(values)


def check_schedulers(schedulers: Sequence[LRScheduler], optimizers: Sequence[Optimizer]) -> None:
    """Check that each scheduler belongs to one of the optimizers, and steps without a metric."""
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("schedulers must step without a metric, got ReduceLROnPlateau, which needs one")
        if all(scheduler.optimizer is not optimizer for optimizer in optimizers):
            raise ValueError(
                f"schedulers must drive one of the optimizers, {type(scheduler).__name__} drives another "
                f"{type(scheduler.optimizer).__name__}"
            )
