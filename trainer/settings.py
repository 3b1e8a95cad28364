"""The settings of a run as plain values: saved with its results, compared between ranks and when resuming."""

import hashlib
import json
import logging
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from ..engine import State
from ..engine.identity import as_text, find_opaque
from ..engine.identity import describe as describe_value
from . import distributed
from .torch_internals import buffer_slots, split_scheduler

_log = logging.getLogger(__name__)

# Besides options, these may differ from the resumed run; a warning names them. Buffers are compared when they are
# loaded.
_ENVIRONMENT = ("torch", "python", "world_size", "buffers")
_CODE = re.compile(r"(\d+\.\d+):[0-9a-f]+")  # code of a function: version of Python and hash


def describe(state: State, options: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the settings of a run as nested plain values. Logs a warning for settings that cannot be compared.

    Args:
        state: State before the first step.
        options: Options of the Trainer that are not part of the state.
    """
    settings = {
        **options,
        "model": type(state.model).__name__,
        "parameters": _fingerprint(state.model),
        "buffers": _fingerprint_buffers(state.model),
        "max_duration": None if state.max_duration is None else str(state.max_duration),
        "algorithms": [describe_value(algorithm) for algorithm in state.algorithms],
        "optimizers": [_describe_optimizer(optimizer) for optimizer in state.optimizers],
        "schedulers": [
            *(_describe_scheduler(scheduler) for scheduler in state.schedulers),
            *(describe_value(schedule) for schedule in state.schedules),
        ],
        "train_dataloader": describe_dataloader(state.train_dataloader),
        "device_train_microbatch_size": state.device_train_microbatch_size,
        "world_size": state.world_size,
        "torch": str(torch.__version__),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }
    if (opaque := find_opaque(settings)) and state.rank == 0:
        _log.warning("a resume cannot tell whether these settings have changed: %s", ", ".join(opaque))
    return json.loads(json.dumps(settings, default=str))


def describe_dataloader(dataloader: Any) -> dict[str, Any] | None:
    """Describe a dataloader without reading from it."""
    if dataloader is None:
        return None
    sizes: dict[str, Any] = {"name": type(dataloader).__name__}
    for name, value in (("batches", dataloader), ("samples", getattr(dataloader, "dataset", None))):
        try:
            sizes[name] = len(value)  # type: ignore[arg-type]  # raises a TypeError without a length
        except TypeError:
            sizes[name] = None
    is_custom = getattr(dataloader, "batch_size", None) is None  # sampler is then a placeholder
    return {
        **sizes,
        "sampler": _describe_sampler(getattr(dataloader, "batch_sampler" if is_custom else "sampler", None)),
        "batch_size": getattr(dataloader, "batch_size", None),
        "drop_last": getattr(dataloader, "drop_last", None),
        "collate_fn": describe_value(getattr(dataloader, "collate_fn", None)),
    }


def check_same_on_all_ranks(settings: dict[str, Any]) -> None:
    """Check that all ranks have the same settings.

    Raises:
        ValueError: If they differ; the message names the first rank and setting that differ from rank 0.
    """
    first, *others = distributed.gather(settings)
    for rank, other in enumerate(others, start=1):
        if changes := _differences(first, other):
            raise ValueError(f"all ranks must have the same settings, rank {rank} differs from rank 0 in {changes[0]}")


def check_same_training(saved: Any, settings: Mapping[str, Any], may_change: Collection[str]) -> None:
    """Check that the settings match those of the resumed run; log a warning for changes that are allowed.

    Args:
        saved: Settings in the checkpoint.
        settings: Settings of this run.
        may_change: Names of options that may differ.

    Raises:
        ValueError: If other settings differ; the message lists them.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"the settings in a checkpoint must be a dictionary, got a {type(saved).__name__}")
    free = {*may_change, *_ENVIRONMENT}
    kept = {name: value for name, value in saved.items() if name not in free}
    if changes := _differences(kept, {name: value for name, value in settings.items() if name not in free}):
        error = ValueError(f"the settings must be those of the run that is resumed, changed: {'; '.join(changes)}")
        error.add_note("to train from its weights anew, pass load_path, load_weights_only=True and another save_folder")
        raise error
    if changes := _differences(saved, settings):
        _log.warning("resuming with other settings: %s", "; ".join(changes))
    if saved.get("python") != settings["python"]:
        _log.warning("the code of functions among the settings is not compared between versions of Python")


def _differences(before: Any, after: Any, name: str = "") -> list[str]:
    """The differences, as ``name: before -> after``."""
    if isinstance(before, dict) and isinstance(after, dict) and before.get("class") == after.get("class"):
        keys = [*before, *(key for key in after if key not in before)]
        pairs = [(f"{name}.{key}", before.get(key), after.get(key)) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(f"{name}.{number}", *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    elif before == after or _is_code_of_other_python(before, after):
        return []
    else:
        return [f"{name.lstrip('.')}: {_shorten(before)} -> {_shorten(after)}"]
    return [text for key, one, other in pairs for text in _differences(one, other, key)]


def _is_code_of_other_python(before: Any, after: Any) -> bool:
    if not isinstance(before, str) or not isinstance(after, str):
        return False
    codes = _CODE.fullmatch(before), _CODE.fullmatch(after)
    return codes[0] is not None and codes[1] is not None and codes[0][1] != codes[1][1]


def _shorten(value: Any) -> str:
    text = as_text(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fingerprint(model: torch.nn.Module) -> str:
    """The number of parameters, with a hash of their names, shapes and dtypes."""
    parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    digest = hashlib.sha256(repr(parameters).encode()).hexdigest()
    return f"{sum(p.numel() for p in model.parameters())} ({digest[:16]})"


def _fingerprint_buffers(model: torch.nn.Module) -> str:
    """A hash of names, shapes and dtypes of the buffers, with those that are None."""
    forms = {
        name: None if (b := getattr(*slot)) is None else (tuple(b.shape), str(b.dtype))
        for name, slot in buffer_slots(model).items()
    }
    return hashlib.sha256(repr(forms).encode()).hexdigest()[:16]


def _describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "params": len(group["params"])}
        for group in optimizer.param_groups
    ]
    return {"name": type(optimizer).__name__, "groups": describe_value(groups)}


def _describe_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    """Describe the state_dict of `scheduler` and its functions, which are not part of it."""
    saved, inner_schedulers = split_scheduler(scheduler)
    functions = {name: value for name, value in vars(scheduler).items() if _has_functions(value)}
    inner = [_describe_scheduler(item) for item in inner_schedulers]
    return {
        "name": type(scheduler).__name__,
        **describe_value({**saved, **functions}),
        **({"schedulers": inner} if inner else {}),
    }


def _has_functions(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(callable(item) and not isinstance(item, LRScheduler) for item in values)


def _describe_sampler(sampler: Any) -> Any:
    """Describe the settings of a sampler, without its dataset and its generator, which the Trainer seeds."""
    described = describe_value(sampler)
    if not isinstance(sampler, Sampler) or not isinstance(described, dict):
        return described
    inner = {name: _describe_sampler(value) for name, value in vars(sampler).items() if isinstance(value, Sampler)}
    kept = {name: value for name, value in described.items() if name not in ("data_source", "dataset", "generator")}
    return {**kept, **inner}
