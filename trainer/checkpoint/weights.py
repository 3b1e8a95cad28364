"""The weights in a checkpoint: those that trained, their averages, and those that evaluate in a plain model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .factors import apply_factors, factors_of
from .file import CheckpointError
from .loading import read_start
from .shards import whole_tensors


def load_weights(path: str | Path, *, folded: bool = True, averaged: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint as the ``state_dict`` of its model, unsharded and on the CPU.

    By default they are those of the plain model, without any algorithm: where evaluation multiplies a part of the
    model by a factor, as after a training with `StochasticDepth`, the factor is folded into the last layer of the
    part. The plain model then evaluates as the trained one did.

    Args:
        path: A checkpoint, or a folder, of which the newest valid one is used.
        folded: False gives the weights as they were trained. A model without the algorithms of the training then
            computes something else, unless `load_evaluation_factors` are applied.
        averaged: Whether to take the averages of the weights that an algorithm such as `EMA` keeps.

    Raises:
        ValueError: If the file is damaged or not a checkpoint, a part with a factor has no layer to fold it into, or
            there are no averages.
        FileNotFoundError: If there is no checkpoint at `path`.
    """
    path, contents = read_start(Path(path))
    if averaged and find_averages(contents) is None:
        raise ValueError(f"averaged must be False for a checkpoint without averages of the weights, as {path} is")
    weights = whole_tensors((averaged_weights if averaged else trained_weights)(contents), contents, path.parent)
    if not folded:
        return weights
    try:
        return apply_factors(weights, factors_of(contents))
    except ValueError as error:
        failure = CheckpointError(path, f"the factors of its evaluation cannot be folded into the weights: {error}")
        failure.add_note("folded=False gives the weights as they were trained, load_evaluation_factors the factors")
        raise failure from error


def load_evaluation_factors(path: str | Path) -> list[dict[str, Any]]:
    """By which factors other than 1 an evaluation multiplied what parts of the model compute.

    Args:
        path: A checkpoint, or a folder, of which the newest valid one is used.

    Returns:
        For each part the name of its ``"module"``, such as a residual block, the ``"factor"``, the names of the
        ``"parameters"`` into which it can be folded, and the ``"obstacle"`` if there are none.

    Raises:
        ValueError: If the file is damaged or not a checkpoint.
        FileNotFoundError: If there is no checkpoint at `path`.
    """
    _, contents = read_start(Path(path))
    return factors_of(contents)


def for_plain_model(contents: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A checkpoint whose weights are those with which its run was evaluated, in a model without any algorithm.

    Raises:
        ValueError: If a part with a factor has no layer to fold it into.
    """
    weights = whole_tensors(averaged_weights(contents), contents, folder)
    try:
        folded = apply_factors(weights, factors_of(contents))
    except ValueError as error:
        error.add_note("with the algorithms of its training, the Trainer evaluates it as it is")
        raise
    buffers = {**contents["buffers"], **_of_names(find_averages(contents), contents["buffers"])}
    return {**contents, "model": folded, "buffers": buffers}


def trained_weights(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that train, also where the checkpoint was saved in the middle of an evaluation of the averages."""
    return _exchanged(contents) if _is_active(contents) else dict(contents["model"])


def averaged_weights(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The averages of the weights; the weights that train where there are none."""
    return dict(contents["model"]) if _is_active(contents) else _exchanged(contents)


def find_averages(contents: Mapping[str, Any]) -> dict[str, Any] | None:
    """The averages of parameters and buffers that an algorithm keeps, by name; None if there are none.

    Where the model of the checkpoint has the averages, they are the weights that train.
    """
    number = _algorithm_with_averages(contents)
    if number is None:
        return None
    of_buffers = contents["ranks"][0]["algorithms"][number].get("averages", {})
    return {**contents["algorithms"][number]["state"]["averages"], **of_buffers}


def _algorithm_with_averages(contents: Mapping[str, Any]) -> int | None:
    states = [saved["state"] for saved in contents.get("algorithms", ())]
    return next((number for number, state in enumerate(states) if state.get("averages")), None)


def _is_active(contents: Mapping[str, Any]) -> bool:
    number = _algorithm_with_averages(contents)
    return number is not None and bool(contents["algorithms"][number]["state"].get("is_active"))


def _exchanged(contents: Mapping[str, Any]) -> dict[str, Any]:
    return {**contents["model"], **_of_names(find_averages(contents), contents["model"])}


def _of_names(averages: Mapping[str, Any] | None, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (averages or {}).items() if name in names}
