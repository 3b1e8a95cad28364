"""The tensors that an algorithm works on: parts of the batch, and the outputs for it."""

from typing import Any

from torch import Tensor

from ..engine import Algorithm, State


def tensor_at(state: State, algorithm: Algorithm, setting: str) -> Tensor:
    """The tensor of the batch that a setting of an algorithm names.

    Args:
        state: The run, with a batch.
        algorithm: Who needs the tensor.
        setting: Such as ``target_key``; its value is a key as in `State.batch_get_item`.

    Raises:
        ValueError: If the batch has no tensor there.
    """
    key: Any = getattr(algorithm, setting)
    name, batch = f"{type(algorithm).__name__}", state.batch
    try:
        # A batch that is one tensor would give its row number `key`.
        value = None if isinstance(batch, Tensor) and not isinstance(key, tuple) else state.batch_get_item(key)
    except (LookupError, AttributeError, TypeError) as error:
        raise ValueError(_message(name, setting, key, batch, "nothing")) from error
    if not isinstance(value, Tensor):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(_message(name, setting, key, batch, found))
    return value


def logits_of(state: State, algorithm: Algorithm) -> Tensor:
    """The outputs of the model.

    Args:
        state: The run, after a forward pass.
        algorithm: Who needs them.

    Raises:
        ValueError: If they are no tensor.
    """
    if not isinstance(state.outputs, Tensor):
        kind = type(state.outputs).__name__
        raise ValueError(f"{type(algorithm).__name__} needs a model whose output is one tensor of logits, got a {kind}")
    return state.outputs


def _message(name: str, setting: str, key: Any, batch: Any, found: str) -> str:
    kind = type(batch).__name__
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{name} needs batches with a tensor at {setting}={key!r}, got {found} there in a {kind}{size}"
