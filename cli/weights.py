"""The file of a finished run's weights: tensors and plain values, loaded with ``weights_only=True``."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..algorithms import StochasticDepth
from ..algorithms.stochastic_depth import apply_stochastic_depth, fold_stochastic_depth
from ..models import create_model

_KEYS = {"model", "num_classes", "image_size", "drop_rates", "scaling", "state_dict"}


def save_weights(path: Path, model: str, network: Any, stochastic_depth: StochasticDepth, image_size: int) -> None:
    """Save the ``state_dict`` of the network, and what is needed to build and fold it."""
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
    """Load the network of a run, fold the drop rates into its weights, and return it with the size of its images.

    Raises:
        FileNotFoundError: If `path` does not exist.
        ValueError: If `path` was not written by `save_weights`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be the folder of a finished etude train, got {path.parent} without {path.name}"
        )
    try:
        contents: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} must be a weights file of etude train, but it cannot be read: {error}") from error
    if not isinstance(contents, dict) or set(contents) != _KEYS:
        raise ValueError(f"{path} must be a weights file of etude train, but its contents differ")
    network = create_model(contents["model"], contents["num_classes"])
    network.load_state_dict(contents["state_dict"])
    rates, scaling = contents["drop_rates"], contents["scaling"]
    if any(rates) and scaling == "evaluation":
        apply_stochastic_depth(network, drop_rate=1.0, drop_distribution=rates)
        fold_stochastic_depth(network)
    return network.eval(), contents["image_size"]
