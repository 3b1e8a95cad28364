"""The weights of a finished run: plain tensors and numbers, which load safely anywhere."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..algorithms import StochasticDepth
from ..algorithms.stochastic_depth import apply_stochastic_depth, fold_stochastic_depth
from ..models import create_model

_KEYS = {"model", "num_classes", "image_size", "drop_rates", "scaling", "state_dict"}


def save_weights(path: Path, model: str, network: Any, stochastic_depth: StochasticDepth, image_size: int) -> None:
    """Save the network's own ``state_dict``, with what is needed to evaluate it as it was trained."""
    contents = {
        "model": model,
        "num_classes": network.fc.out_features,
        "image_size": image_size,
        "drop_rates": list(stochastic_depth.plan.rates),
        "scaling": stochastic_depth.plan.scaling,
        "state_dict": network.state_dict(),
    }
    torch.save(contents, path)


def load_folded(path: Path) -> tuple[nn.Module, int]:
    """Load a run's network with its drop rates folded into the weights, and the size of its images.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not what `save_weights` writes.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be the folder of a finished etude train, got {path.parent} without {path.name}"
        )
    try:
        contents: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} must be a weights file of etude train, it cannot be read: {error}") from error
    if not isinstance(contents, dict) or set(contents) != _KEYS:
        raise ValueError(f"{path} must be a weights file of etude train, its contents are others")
    network = create_model(contents["model"], contents["num_classes"])
    network.load_state_dict(contents["state_dict"])
    rates, scaling = contents["drop_rates"], contents["scaling"]
    if any(rates) and scaling == "evaluation":
        apply_stochastic_depth(network, drop_rate=1.0, drop_distribution=rates)
        fold_stochastic_depth(network)
    return network.eval(), contents["image_size"]
