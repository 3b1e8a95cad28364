"""Weights from files, for a network that may have another last layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .head import find_head

_CONTAINERS = ("state_dict", "model_ema", "model")  # under which the checkpoints of other programs keep the weights


class LoadedWeights(NamedTuple):
    """What became of the weights of a file.

    Args:
        taken: How many tensors were taken.
        initialized: The tensors of the network that the file does not have, or has for other classes.
        unused: The tensors of the file that the network does not have.
    """

    taken: int
    initialized: list[str]
    unused: list[str]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read weights from a ``.safetensors`` file, or from a ``.pt`` file with ``weights_only=True``.

    Checkpoints that keep them under ``"state_dict"``, ``"model_ema"`` or ``"model"``, as those of timm and torchvision
    do, are accepted, and a prefix ``module.`` of all names is removed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold tensors by name, or safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file of weights, there is none at {path}")
    contents = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for name in _CONTAINERS:
        if isinstance(contents, Mapping) and isinstance(contents.get(name), Mapping):
            contents = contents[name]
            break
    if not isinstance(contents, Mapping) or not contents or not all(map(_is_weight, contents.items())):
        raise ValueError(f"weights must be a file of tensors by name, {path} holds something else")
    weights = dict(contents)
    while all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def load_weights_partly(network: nn.Module, weights: Mapping[str, Tensor], num_classes: int) -> LoadedWeights:
    """Load weights into a network, except for a last layer of other classes, which stays as it is.

    Args:
        network: Changed in place.
        weights: By the names of the network.
        num_classes: Number of classes of the network.

    Raises:
        ValueError: If a tensor other than those of the last layer is missing or has another shape. The network is then
            unchanged.
    """
    head = find_head(network, num_classes)
    own = network.state_dict()
    fits = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    rest = [name for name in own if name not in fits]
    bad = [name for name in rest if name.rpartition(".")[0] != head]
    if bad:
        name = bad[0]
        theirs = f"is of shape {tuple(weights[name].shape)}" if name in weights else "is missing"
        raise ValueError(
            f"weights must fit {type(network).__name__} except for its last layer, but {len(bad)} of its {len(own)} "
            f"tensors do not: {name} {theirs}, and {tuple(own[name].shape)} in the network"
        )
    network.load_state_dict(fits, strict=False)
    return LoadedWeights(len(fits), rest, [name for name in weights if name not in own])


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ValueError(f"safetensors must be installed to read {path}: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights must be a safetensors file, {path} cannot be read as one: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage makes unpicklers raise nearly anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"weights must be a file of tensors that torch.load reads with weights_only=True, {path} is not: {reason}"
        ) from error


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
