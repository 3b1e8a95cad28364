"""What a checkpoint holds: everything that the next step depends on, taken from a run and given back to one."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import Logger, State, Timestamp
from . import distributed
from .checkpoint_file import VERSION
from .settings import check_same_training


def contents_of(state: State, logger: Logger) -> dict[str, Any]:
    """Everything that the next step of a run depends on, as plain values and tensors.

    All ranks must call it together, as the algorithms and generators of each are in it; all else is that
    of rank 0.
    """
    return {
        "version": VERSION,
        "settings": state.settings,
        "timestamp": state.timestamp.state_dict(),
        "evaluated_at": state.evaluated_at,
        "eval_metrics": dict(state.eval_metrics),
        "device_train_microbatch_size": state.device_train_microbatch_size,
        "model": dict(state.model.state_dict()),
        "optimizers": _states(state.optimizers),
        "schedulers": _states(state.schedulers),
        "scaler": state.scaler.state_dict(),
        "callbacks": _states(state.callbacks),
        "loggers": _states(logger.destinations),
        "ranks": distributed.gather({"algorithms": _states(state.algorithms), "generators": _generators(state.device)}),
    }


def restore(contents: Mapping[str, Any], state: State, logger: Logger) -> None:
    """Give a run what `contents_of` took, except for the generators, which `restore_generators` gives back.

    Raises:
        ValueError: If the settings make it a different training, or the contents do not fit the run.
            Model and optimizers are then unchanged.
    """
    try:
        check_same_training(contents["settings"], state.settings, state)
        timestamp = Timestamp.from_state_dict(contents["timestamp"])
        _check_same_shapes(contents["model"], state.model)
        pairs = [
            *_pairs(_of_this_rank(contents)["algorithms"], state.algorithms, "algorithms"),
            *_pairs(contents["optimizers"], state.optimizers, "optimizers"),
            *_pairs(contents["schedulers"], state.schedulers, "schedulers"),
            *_pairs_by_name(contents["callbacks"], state.callbacks),
            # Last, as it cuts off what the files of the run hold after this moment.
            *_pairs_by_name(contents["loggers"], logger.destinations),
        ]
        restore_weights(contents, state.model)
        for thing, saved in pairs:
            thing.load_state_dict(saved)
        if state.scaler.is_enabled():
            state.scaler.load_state_dict(contents["scaler"])
        state.timestamp = timestamp
        state.evaluated_at = int(contents["evaluated_at"])
        state.eval_metrics = {str(name): float(value) for name, value in contents["eval_metrics"].items()}
        state.device_train_microbatch_size = _microbatch_size(contents["device_train_microbatch_size"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the checkpoint does not hold what a run needs: {error!r}") from error


def restore_weights(contents: Mapping[str, Any], model: nn.Module) -> None:
    """Give a model the weights of a checkpoint.

    Raises:
        ValueError: If names or shapes differ. The model is then unchanged.
    """
    _check_same_shapes(contents["model"], model)
    model.load_state_dict(contents["model"])


def restore_generators(contents: Mapping[str, Any], device: torch.device) -> None:
    """Put the global generators of this rank (python, numpy, torch) into the state they were in."""
    if distributed.rank() >= len(contents["ranks"]):
        return  # the run was on fewer ranks: this one's generators keep their seed
    try:
        saved = _of_this_rank(contents)["generators"]
        version, words, gauss = saved["python"]
        random.setstate((version, tuple(words), gauss))
        numpy_state = {**saved["numpy"], "state": {**saved["numpy"]["state"]}}
        numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy_state)  # noqa: NPY002  # the global generator is what user code draws from
        torch.set_rng_state(saved["torch"])
        if device.type == "cuda" and "cuda" in saved:
            torch.cuda.set_rng_state(saved["cuda"], device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the checkpoint does not hold the state of the generators: {error!r}") from error


def _of_this_rank(contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """What this rank had, or what rank 0 had where the run was on fewer ranks."""
    ranks = contents["ranks"]
    return ranks[distributed.rank() if distributed.rank() < len(ranks) else 0]


def _generators(device: torch.device) -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    states: dict[str, Any] = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _states(things: Sequence[Any]) -> list[dict[str, Any]]:
    """The class is kept to be compared, never to be looked up."""
    return [{"name": type(thing).__name__, "state": thing.state_dict()} for thing in things]


def _pairs(saved: Sequence[Mapping[str, Any]], things: Sequence[Any], name: str) -> list[tuple[Any, Any]]:
    """Each thing with its state; what changes training must all be there again."""
    before, now = [item["name"] for item in saved], [type(thing).__name__ for thing in things]
    if before != now:
        raise ValueError(f"{name} must be those of the run that is resumed, {before!r}, got {now!r}")
    return [(thing, item["state"]) for thing, item in zip(things, saved, strict=True)]


def _pairs_by_name(saved: Sequence[Mapping[str, Any]], things: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each thing with its state where there is one; what only watches may come and go."""
    states: dict[str, list[Any]] = {}
    for item in saved:
        states.setdefault(item["name"], []).append(item["state"])
    return [(thing, states[name].pop(0)) for thing in things if states.get(name := type(thing).__name__)]


def _check_same_shapes(saved: Any, model: nn.Module) -> None:
    if not isinstance(saved, dict):
        raise ValueError(f"the weights in a checkpoint must be a dictionary, got a {type(saved).__name__}")
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and (
            not isinstance(saved.get(name), Tensor) or saved[name].shape != tensor.shape
        ):
            found = f"shape {tuple(saved[name].shape)}" if isinstance(saved.get(name), Tensor) else "nothing"
            raise ValueError(
                f"the checkpoint must fit the model, {name!r} has shape {tuple(tensor.shape)}, got {found}"
            )
    if strangers := [name for name in saved if name not in model.state_dict()]:
        raise ValueError(f"the checkpoint must fit the model, which has nothing named {strangers[0]!r}")


def _microbatch_size(size: Any) -> int | None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"the microbatch size in a checkpoint must be a whole number, got {size!r}")
    return size
