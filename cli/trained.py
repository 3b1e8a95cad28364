"""The trained network of a run in one file, with everything that evaluates it and names its classes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..algorithms.blurpool import apply_blurpool
from ..algorithms.stochastic_depth import apply_stochastic_depth, fold_stochastic_depth
from ..algorithms.stochastic_depth.plan import DropPlan
from ..datasets import eval_transform
from ..models import create_model
from ..trainer.checkpoint.file import read_checkpoint
from ..trainer.checkpoint.folder import POINTERS, read_pointer
from ..trainer.checkpoint.weights import for_plain_model
from .start import CHECKPOINTS

WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Recorded:
    """What is known of a trained network besides its weights.

    Args:
        model: Its name.
        class_names: Of each class number.
        image_size: Height and width of its images in pixels.
        resize_size: Of the shorter side of an image before its centre is cropped.
        mean: Of each channel, in [0, 1], as it is subtracted.
        std: Of each channel.
        blurpool: Whether its strided layers filter.
        drop_rates: Of each block at the end of training; empty for a plain network.
        scaling: When the rates scale the branches: evaluation or training.
        drop_unit: Whether the rates are those of blocks or of branches.
    """

    model: str
    class_names: tuple[str, ...]
    image_size: int
    resize_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    blurpool: bool = False
    drop_rates: tuple[float, ...] = ()
    scaling: str = "evaluation"
    drop_unit: Literal["block", "branch"] = "block"


@dataclass(frozen=True)
class Trained:
    """A trained network, in evaluation mode on the CPU.

    Args:
        network: Evaluates as at the end of training.
        recorded: What else is known.
    """

    network: nn.Module
    recorded: Recorded

    def folded(self) -> nn.Module:
        """A copy of the network without stochastic depth, with its drop rates folded into the weights.

        Raises:
            ValueError: If a branch has no layer to fold its rate into.
        """
        network = copy.deepcopy(self.network)
        return fold_stochastic_depth(network) if _has_factors(self.recorded) else network

    def with_weights_of(self, folder: Path, checkpoint: str) -> Trained:
        """The same network with the weights of a checkpoint, as they were evaluated when it was saved.

        Args:
            folder: Of the run.
            checkpoint: ``"best"``, ``"latest"`` or a file.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If its weights are those of another network, or a branch has no layer to fold its rate into.
        """
        name = read_pointer(folder / CHECKPOINTS, checkpoint) if checkpoint in POINTERS else None
        path = folder / CHECKPOINTS / name if name is not None else Path(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint must be best, latest or a file, there is none at {path}")
        network = _build(self.recorded)
        network.load_state_dict(load_evaluated_weights(path))
        return Trained(network.eval(), replace(self.recorded, drop_rates=()))

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """Turns an image of PIL in RGB into what the network takes."""
        mean, std = self.recorded.mean, self.recorded.std
        return eval_transform(
            self.recorded.image_size,
            (mean[0], mean[1], mean[2]),
            (std[0], std[1], std[2]),
            resize_size=self.recorded.resize_size,
        )


def record_depth(plan: DropPlan | None, drop_unit: str) -> dict[str, Any]:
    """The fields of `Recorded` about stochastic depth."""
    if plan is None:
        return {}
    return {"drop_rates": tuple(plan.rates), "scaling": plan.scaling, "drop_unit": drop_unit}


def save_trained(folder: Path, network: nn.Module, recorded: Recorded) -> None:
    """Write ``weights.pt``, at once, so that a kill leaves the file before or the new one.

    Args:
        folder: Of the run.
        network: The plain or converted network; both have the same ``state_dict``.
        recorded: What is known of it.
    """
    new = folder / f"{WEIGHTS}.new"
    torch.save({**asdict(recorded), "state_dict": dict(network.state_dict())}, new)
    os.replace(new, folder / WEIGHTS)


def load_trained(folder: Path) -> Trained:
    """Load the network of a run.

    Args:
        folder: Of the run, or its file ``weights.pt``.

    Raises:
        FileNotFoundError: If the run is not finished, or there is none.
        ValueError: If the file was not written by `save_trained`.
    """
    path = folder / WEIGHTS if folder.suffix != ".pt" else folder
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be the folder of a finished etude train, got {path.parent} without {path.name}"
        )
    try:
        contents: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} must be a weights file of etude train, but it cannot be read: {reason}") from error
    names = {field.name for field in fields(Recorded)}
    if not isinstance(contents, dict) or set(contents) != names | {"state_dict"}:
        raise ValueError(f"{path} must be a weights file of etude train, but its contents differ")
    weights = contents.pop("state_dict")
    recorded = Recorded(**contents)
    network = _build(recorded)
    network.load_state_dict(weights)
    if _has_factors(recorded):
        apply_stochastic_depth(
            network, drop_rate=1.0, drop_distribution=recorded.drop_rates, drop_unit=recorded.drop_unit
        )
    return Trained(network.eval(), recorded)


def load_evaluated_weights(path: Path) -> dict[str, Tensor]:
    """The weights of the plain network with which a checkpoint's evaluation computes: averaged, and folded.

    Raises:
        ValueError: If the file is no checkpoint, or a branch has no layer to fold its rate into.
    """
    contents = for_plain_model(read_checkpoint(path), path.parent)
    return {name.removeprefix("module."): value for name, value in contents["model"].items()}


def _build(recorded: Recorded) -> nn.Module:
    network = create_model(recorded.model, len(recorded.class_names), image_size=recorded.image_size)
    return apply_blurpool(network) if recorded.blurpool else network


def _has_factors(recorded: Recorded) -> bool:
    return any(recorded.drop_rates) and recorded.scaling == "evaluation"
