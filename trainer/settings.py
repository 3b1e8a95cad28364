"""The settings of a run as plain values: to be kept beside its results, and compared over ranks and resumes."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..engine import State
from . import distributed

_log = logging.getLogger(__name__)

# What may differ between the run that saved and the one that resumes; the message names it all the same.
_FREE = ("device", "torch", "world_size", "deterministic_mode", "eval_interval", "max_duration", "parallelism")


def describe(state: State, **others: Any) -> dict[str, Any]:
    """The settings of a run, nested plain values.

    Args:
        state: The run before its first step.
        others: Further settings by name.
    """
    settings = {
        "model": type(state.model).__name__,
        "parameters": _fingerprint(state.model),
        "max_duration": None if state.max_duration is None else str(state.max_duration),
        "algorithms": [repr(algorithm) for algorithm in state.algorithms],
        "optimizers": [_describe_optimizer(optimizer) for optimizer in state.optimizers],
        "schedulers": [_describe_scheduler(scheduler) for scheduler in state.schedulers],
        "train_dataloader": describe_dataloader(state.train_dataloader),
        "device": state.device.type,
        "device_train_microbatch_size": state.device_train_microbatch_size,
        "seed": state.seed,
        "world_size": state.world_size,
        "torch": str(torch.__version__),
        **others,
    }
    return json.loads(json.dumps(settings, default=str))


def describe_dataloader(dataloader: Any) -> dict[str, Any] | None:
    """What can be told of a dataloader without reading it; None for none."""
    if dataloader is None:
        return None
    sizes: dict[str, Any] = {"name": type(dataloader).__name__}
    for name, value in (("batches", dataloader), ("samples", getattr(dataloader, "dataset", None))):
        try:
            sizes[name] = len(value)  # type: ignore[arg-type]  # TypeError is the answer
        except TypeError:
            sizes[name] = None
    for name in ("sampler", "batch_sampler"):
        sizes[name] = type(getattr(dataloader, name, None)).__name__
    return {**sizes, "batch_size": getattr(dataloader, "batch_size", None)}


def check_same_on_all_ranks(settings: dict[str, Any]) -> None:
    """Refuse ranks that were started with different settings.

    Raises:
        ValueError: It names the first rank that differs from rank 0, and in what.
    """
    first, *others = distributed.gather(settings)
    for rank, other in enumerate(others, start=1):
        if changes := _differences(first, other):
            raise ValueError(f"all ranks must have the same settings, rank {rank} differs from rank 0 in {changes[0]}")


def check_same_training(saved: Any, settings: dict[str, Any], state: State) -> None:
    """Refuse to resume where the continuation would be a different training, and name what else changed.

    Raises:
        ValueError: It names all settings that stand in the way.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"the settings in a checkpoint must be a dictionary, got a {type(saved).__name__}")
    free = [name for name in _FREE if name != "max_duration" or not _depends_on_duration(state)]
    kept = {name: value for name, value in saved.items() if name not in free}
    if changes := _differences(kept, {name: value for name, value in settings.items() if name not in free}):
        raise ValueError(
            f"the settings must be those of the run that is resumed, changed: {'; '.join(changes)}. A new "
            "training from its weights takes load_path, load_weights_only=True and another save_folder"
        )
    if changes := _differences(saved, settings):
        _log.warning("resuming with other settings: %s", "; ".join(changes))


def _depends_on_duration(state: State) -> bool:
    return any(algorithm.depends_on_duration for algorithm in state.algorithms)


def _differences(before: Any, after: Any, name: str = "") -> list[str]:
    """What differs, as ``name: before -> after``."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        pairs = [(f"{name}.{key}", before.get(key), after.get(key)) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(f"{name}.{number}", *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    else:
        return [] if before == after else [f"{name.lstrip('.')}: {before!r} -> {after!r}"]
    return [text for key, one, other in pairs for text in _differences(one, other, key)]


def _fingerprint(model: torch.nn.Module) -> str:
    """The number of parameters, and a hash of names, shapes and number formats."""
    parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    digest = hashlib.sha256(repr(parameters).encode()).hexdigest()
    return f"{sum(p.numel() for p in model.parameters())} ({digest[:16]})"


def _describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "params": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"name": type(optimizer).__name__, "groups": [_plain(group) for group in groups]}


def _describe_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    return {"name": type(scheduler).__name__, **_plain(scheduler.state_dict())}


def _plain(value: Any) -> Any:
    """Numbers, strings and nests of them; of anything else only its type, as a text may hold an address."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
