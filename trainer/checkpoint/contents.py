"""The contents of a checkpoint: everything that the next step depends on, taken from a run and restored to one."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import Logger, State
from ...engine.checks import check_int
from ...engine.identity import describe
from ...engine.time import Count
from .. import distributed
from ..checks import check_attached
from ..data.sampling import num_batches
from ..options import MAY_CHANGE
from ..reproducibility import generator_states, generators_kept, set_generator_states
from ..settings import check_same_training
from ..torch_internals import buffer_slots, mark_stepped
from ..weights import check_weights
from .factors import describe_factors, factors_of, may_have_factors
from .file import VERSION, check_loadable
from .fitting import check_fits
from .shards import fit_to, matched, without_shards
from .weights import for_plain_model, trained_weights

_MAX_COMPARED = 4096  # elements of a tensor


def contents_of(state: State, logger: Logger) -> dict[str, Any]:
    """Everything that the next step of a run depends on, as plain values and tensors.

    All ranks must call it together. ``"ranks"`` holds what differs between ranks, once per rank; all else is that of
    rank 0.

    Raises:
        FloatingPointError: If the latest step or the weights are not finite.
        RuntimeError: If the weights differ between ranks that hold copies of them.
        ValueError: If what an algorithm keeps once differs between ranks.
    """
    state.settle()
    check_attached(state)
    check_weights(state.model, state.timestamp.batch)
    algorithms = _states(state.algorithms)
    of_this_rank = {
        "algorithms": [_plain_counts(algorithm.rank_state_dict()) for algorithm in state.algorithms],
        "generators": generator_states(state.device),
    }
    ranks = distributed.gather((of_this_rank, [_fingerprint(item["state"]) for item in algorithms]))
    _check_kept_once(algorithms, [fingerprints for _, fingerprints in ranks])
    return {
        "version": VERSION,
        "settings": state.settings,
        "progress": state.state_dict(),
        "model": dict(state.model.state_dict()),
        "buffers": _other_buffers(state.model),
        "evaluation_factors": describe_factors(state),
        "optimizers": _states(state.optimizers),
        "schedulers": _states(state.schedulers),
        "scaler": state.scaler.state_dict(),
        "algorithms": algorithms,
        "callbacks": _states(state.callbacks),
        "loggers": _states(logger.destinations),
        "ranks": [of_rank for of_rank, _ in ranks],
    }


def check_savable(state: State, logger: Logger) -> None:
    """Check that the states of all parts of a run could be saved now. All ranks must call it together.

    Raises:
        TypeError: If a state holds anything but plain values and tensors.
    """
    things = [*state.algorithms, *state.callbacks, *logger.destinations, *state.optimizers, *state.schedulers]
    with distributed.all_or_none():
        for item in _states(things):
            check_loadable(without_shards(item["state"]), f"the state of {item['name']}")
        for algorithm in state.algorithms:
            check_loadable(without_shards(algorithm.rank_state_dict()), f"the state of {type(algorithm).__name__}")


def restore(contents: Mapping[str, Any], state: State, logger: Logger, folder: Path) -> None:
    """Restore what `contents_of` returned, except for the generators, which `restore_generators` restores.

    Args:
        contents: Of the checkpoint.
        state: The run, before its first step.
        logger: The run's.
        folder: The folder of the checkpoint and its shards.

    Raises:
        ValueError: If settings that must match differ, or the contents do not fit the run.
            The run is then unchanged.
    """
    before: list[tuple[Callable[[Any], Any], Any]] = []
    try:
        check_same_training(contents["settings"], state.settings, _may_change(state))
        _check_place_in_epoch(contents["progress"], state)
        contents = fit_to(contents, state, folder)
        factors_of(contents)
        _check_model(contents, state)
        with generators_kept():
            restore_generators(contents, torch.device("cpu"))
        pairs = [
            *_pairs(contents["algorithms"], state.algorithms, "algorithms"),
            *_pairs(contents["optimizers"], state.optimizers, "optimizers"),
            *_pairs(contents["schedulers"], state.schedulers, "schedulers"),
            *((thing, item["state"]) for item, thing in matched(contents["callbacks"], state.callbacks)),
            (state, contents["progress"]),
            *([(state.scaler, _numbers(contents["scaler"]))] if state.scaler.is_enabled() else []),
        ]
        files = matched(contents["loggers"], logger.destinations)
        for thing, saved in pairs:
            check_fits(saved, thing, contents["progress"]["timestamp"]["batch"])
        for thing, saved in pairs:
            before.append((thing.load_state_dict, deepcopy(thing.state_dict())))
            thing.load_state_dict(saved)
        for algorithm, saved in zip(state.algorithms, _of_this_rank(contents)["algorithms"], strict=True):
            before.append((algorithm.load_rank_state_dict, deepcopy(algorithm.rank_state_dict())))
            algorithm.load_rank_state_dict(saved)
        for optimizer in state.optimizers:
            mark_stepped(optimizer)
        # Last, as it truncates the files of the run; loading weights that fit does not fail.
        for saved, destination in files:
            destination.load_state_dict(saved["state"])
        _load_model(contents, state)
    except Exception as error:
        for load_state_dict, kept in before:
            with suppress(Exception):  # this may fail too; the first error is the one to raise
                load_state_dict(kept)
        if isinstance(error, (ValueError, OSError)):
            raise
        raise ValueError(f"the checkpoint does not hold what a run needs: {error!r}") from error


def _check_place_in_epoch(progress: Mapping[str, Any], state: State) -> None:
    """Refuse a number of batches that no epoch has, where the length of epochs is known exactly."""
    if (length := num_batches(state.train_dataloader)) is not None:
        check_int("batch_in_epoch", progress["timestamp"]["batch_in_epoch"], ge=0, le=length)


def restore_weights(contents: Mapping[str, Any], state: State, folder: Path) -> None:
    """Load the weights of a checkpoint into the model of a run, and nothing else.

    Raises:
        ValueError: If names, shapes or dtypes differ, or the weights were trained with factors in evaluation that the
            model does not have. The model is then unchanged.
    """
    try:
        if factors_of(contents) and not may_have_factors(state):
            raise ValueError(
                "the weights must be loaded into a model with the stochastic depth that they were trained with, whose "
                "evaluation multiplies its residual branches, or be folded: "
                "model.load_state_dict(etude.trainer.load_weights(path))"
            )
        others = dict.fromkeys(("optimizers", "algorithms", "callbacks"), ())
        weights = {**others, "model": trained_weights(contents), "shards": contents.get("shards")}
        weights = fit_to(weights, state, folder)
        _check_same_forms(weights["model"], state.model.state_dict())
        state.model.load_state_dict(weights["model"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint does not hold the weights of a model: {error!r}") from error


def restore_for_evaluation(contents: Mapping[str, Any], state: State, folder: Path) -> None:
    """Give a run without training data and optimizers what its evaluation depends on: weights, algorithms, progress.

    A run without algorithms, of a plain model, gets the weights that evaluate there as those of the checkpoint did
    with its algorithms: averaged and folded.

    Raises:
        ValueError: If algorithms, weights or progress do not fit the run. The model is then unchanged.
    """
    try:
        is_plain = not state.algorithms
        if is_plain:
            contents = {**for_plain_model(contents, folder), "algorithms": ()}
        else:
            _check_same_algorithms(contents["settings"], state.settings)
        contents = fit_to({**contents, "optimizers": (), "callbacks": ()}, state, folder)
        _check_model(contents, state)
        for algorithm, saved in _pairs(contents["algorithms"], state.algorithms, "algorithms"):
            algorithm.load_state_dict(saved)
        for algorithm, saved in zip(state.algorithms, _of_this_rank(contents)["algorithms"], strict=not is_plain):
            algorithm.load_rank_state_dict(saved)
        state.load_state_dict(contents["progress"])
        _load_model(contents, state)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the checkpoint does not hold what an evaluation needs: {error!r}") from error


def _check_same_algorithms(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    compared = ("algorithms", "python")  # the code of functions is compared within one version of Python
    check_same_training({key: saved[key] for key in compared}, {key: settings[key] for key in compared}, ())


def restore_generators(contents: Mapping[str, Any], device: torch.device) -> None:
    """Restore the global generators of this rank (python, numpy, torch)."""
    if distributed.rank() >= len(contents["ranks"]):
        return  # the run had fewer ranks: the generators of this one keep their seed
    try:
        saved = _of_this_rank(contents)["generators"]
        check_int("pos", saved["numpy"]["state"]["pos"], ge=0, le=624)  # numpy would read out of bounds
        set_generator_states(saved, device)
    except Exception as error:
        raise ValueError(f"the checkpoint does not hold the state of the generators: {error!r}") from error


def _may_change(state: State) -> Collection[str]:
    """The options that may differ between the run that is resumed and this one."""
    if any(getattr(thing, "depends_on_duration", False) for thing in (*state.algorithms, *state.schedules)):
        return MAY_CHANGE - {"max_duration"}
    return MAY_CHANGE


def _of_this_rank(contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of this rank, or that of rank 0 if the run had fewer ranks."""
    ranks = contents["ranks"]
    return ranks[distributed.rank() if distributed.rank() < len(ranks) else 0]


def _fingerprint(state: Mapping[str, Any]) -> Any:
    """What can be compared between ranks: the values of a state, but of tensors as large as a model only the shape."""
    if isinstance(state, Tensor):
        return describe(state) if state.numel() <= _MAX_COMPARED else _form(state)
    if isinstance(state, Mapping):
        return {str(name): _fingerprint(item) for name, item in state.items()}
    if isinstance(state, (list, tuple)):
        return [_fingerprint(item) for item in state]
    return describe(state)


def _check_kept_once(algorithms: Sequence[Mapping[str, Any]], fingerprints: Sequence[Sequence[Any]]) -> None:
    for rank, of_rank in enumerate(fingerprints):
        for algorithm, first, other in zip(algorithms, fingerprints[0], of_rank, strict=True):
            if first != other:
                raise ValueError(
                    f"state_dict of {algorithm['name']} must be the same on all ranks, rank {rank} differs from rank "
                    "0; what differs belongs in rank_state_dict"
                )


def _states(things: Sequence[Any]) -> list[dict[str, Any]]:
    """The states with the names of their classes, which are compared when loading and never imported."""
    return [{"name": type(thing).__name__, "state": _plain_counts(thing.state_dict())} for thing in things]


def _plain_counts(value: Any) -> Any:
    """The counters of timestamps as plain ints: a checkpoint holds no other objects."""
    if isinstance(value, Count):
        return int(value)
    if type(value) is dict:
        return {key: _plain_counts(item) for key, item in value.items()}
    return type(value)(map(_plain_counts, value)) if type(value) in (list, tuple) else value


def _pairs(saved: Sequence[Mapping[str, Any]], things: Sequence[Any], name: str) -> list[tuple[Any, Any]]:
    """Pair each object with its saved state; the classes must be the same."""
    before, now = [item["name"] for item in saved], [type(thing).__name__ for thing in things]
    if before != now:
        raise ValueError(f"{name} must be those of the run that is resumed, {before!r}, got {now!r}")
    return [(thing, item["state"]) for thing, item in zip(things, saved, strict=True)]


def _other_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not in the ``state_dict`` (non-persistent)."""
    weights = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in weights}


def _check_model(contents: Mapping[str, Any], state: State) -> None:
    """Check that parameters and buffers fit the model; a buffer may have another shape than at the start of the run."""
    is_same_start = contents["settings"].get("buffers") == state.settings["buffers"]
    owners = {name: type(module).__module__ for name, (module, _) in buffer_slots(state.model).items()}
    may_change = [name for name, owner in owners.items() if is_same_start and not owner.startswith("torch.nn.")]
    _check_same_forms(contents["model"], state.model.state_dict(), may_change)
    _check_same_forms(contents["buffers"], _other_buffers(state.model), may_change)


def _load_model(contents: Mapping[str, Any], state: State) -> None:
    """Load parameters and buffers. A buffer that a forward has replaced by one of another form is replaced here too."""
    saved = {**contents["model"], **contents["buffers"]}
    for name, (module, attribute) in buffer_slots(state.model).items():
        value = saved.get(name)
        if _form(value) != _form(getattr(module, attribute)):
            setattr(module, attribute, None if value is None else value.to(state.device, copy=True))
    state.model.load_state_dict(contents["model"])
    for name, buffer in _other_buffers(state.model).items():
        buffer.copy_(contents["buffers"][name])


def _check_same_forms(saved: Any, own: Mapping[str, Any], may_change: Collection[str] = ()) -> None:
    if not isinstance(saved, dict):
        raise ValueError(f"the weights in a checkpoint must be a dictionary, got a {type(saved).__name__}")
    for name, tensor in own.items():
        if name in may_change and (saved.get(name) is None or _form(saved[name]) != "nothing"):
            continue
        if isinstance(tensor, Tensor) and (found := _form(saved.get(name))) != _form(tensor):
            raise ValueError(f"the checkpoint must fit the model, {name!r} has {_form(tensor)}, got {found}")
    if unknown := [name for name in saved if name not in own and name not in may_change]:
        raise ValueError(f"the checkpoint must fit the model, which has nothing named {unknown[0]!r}")


def _form(tensor: Any) -> str:
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return "nothing"
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}" + ("" if tensor.layout is torch.strided else ", sparse")


def _numbers(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    if wrong := [name for name, value in saved.items() if type(value) not in (int, float)]:
        raise ValueError(f"{wrong[0]} in a checkpoint must be a number, got {saved[wrong[0]]!r:.100}")
    return saved
