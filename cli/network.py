"""The network that a command trains: built by name, with weights to start from and parts that are not trained."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import ModelOptions

if TYPE_CHECKING:
    from torch import nn

    from ..models import ComposerClassifier

BACKBONE = "backbone"


def build_network(options: ModelOptions, num_classes: int, image_size: int) -> nn.Module:
    """The network with its initial weights, which are a function of the state of torch's generator.

    Raises:
        ValueError: If an option is bad, or there are no such weights.
    """
    from ..models import create_model
    from ..models.resnet import RESNETS

    if options.weights is not None and options.pretrained is not None:
        raise ValueError(
            f"weights must not come with pretrained, which gives others, got {options.weights!r} and "
            f"{options.pretrained!r}"
        )
    arguments: dict[str, Any] = _drop_path_argument(options)
    if options.model in RESNETS and options.pretrained is None:
        arguments["zero_init_residual"] = True
    return create_model(options.model, num_classes, weights=options.pretrained, image_size=image_size, **arguments)


def start_from_weights(network: nn.Module, path: str, num_classes: int, *, is_quiet: bool = False) -> None:
    """Load the weights of a file, a run or a checkpoint, and list on standard error what was not taken.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If it holds no weights, or they do not fit apart from the last layer.
    """
    from ..models import load_weights_partly

    loaded = load_weights_partly(network, read_weights(Path(path)), num_classes)
    if is_quiet:
        return
    lines = [f"etude: {loaded.taken} tensors taken from {path}"]
    if loaded.initialized:
        lines.append(f"initialized randomly: {_listed(loaded.initialized)}")
    if loaded.unused:
        lines.append(f"not used: {_listed(loaded.unused)}")
    print("; ".join(lines), file=sys.stderr)


def read_weights(path: Path) -> dict[str, Any]:
    """The weights of a plain network in a file, in a run's folder or in one of its checkpoints."""
    from ..models import read_state_dict
    from ..trainer.checkpoint.folder import CHECKPOINT_NAME
    from .trained import WEIGHTS, load_evaluated_weights, load_trained

    if path.is_dir() or path.name == WEIGHTS:
        folder = path if path.is_dir() else path.parent
        return load_trained(folder).folded().state_dict()
    if CHECKPOINT_NAME.fullmatch(path.name):
        return load_evaluated_weights(path)
    return read_state_dict(path)


def freeze(network: nn.Module, parts: tuple[str, ...], num_classes: int) -> None:
    """Keep parts of a network as they are: their parameters get no gradients, and they stay in evaluation mode.

    Raises:
        ValueError: If there is no part of a name, or nothing would be left to train.
    """
    from ..models import find_head

    modules = dict(network.named_modules())
    for part in parts:
        if part != BACKBONE and not modules.get(part):
            raise ValueError(
                f"freeze must be names of modules of {type(network).__name__} such as "
                f"{', '.join(name for name, _ in network.named_children())}, or {BACKBONE}, got {part!r}"
            )
    head = find_head(network, num_classes)
    for name, module in modules.items():
        own = not any(module.children())
        inside = BACKBONE in parts and name != head
        if own and (inside or any(name == part or name.startswith(f"{part}.") for part in parts)):
            module.eval()
    for name, parameter in network.named_parameters():
        inside = BACKBONE in parts and name.rpartition(".")[0] != head
        if inside or any(name.startswith(f"{part}.") for part in parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"freeze must leave something to train, got {' '.join(parts)}")


def as_classifier(network: nn.Module, num_classes: int) -> ComposerClassifier:
    """The network with loss and metrics: top-1 accuracy, and top-5 where there are more classes than that."""
    from torchmetrics.classification import MulticlassAccuracy

    from ..models import ComposerClassifier

    metrics: dict[str, Any] = {"MulticlassAccuracy": MulticlassAccuracy(num_classes, average="micro")}
    if num_classes > 5:
        metrics["MulticlassTop5Accuracy"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
    return ComposerClassifier(network, num_classes, val_metrics=metrics)


def check_images_fit(network: nn.Module, image_size: int, rows: int) -> None:
    """Refuse images that the network does not take, before any work; nothing is computed.

    Args:
        network: Unchanged.
        image_size: Height and width of the images in pixels.
        rows: The smallest number of images in a training step.

    Raises:
        ValueError: If the network does not take such images, or so few of them, as BatchNorm does not take one value
            per channel.
    """
    import copy

    import torch

    shadow = copy.deepcopy(network).to("meta")
    for count in {2, rows}:
        try:
            shadow(torch.empty(count, 3, image_size, image_size, device="meta"))
        except NotImplementedError:
            return  # an operation without a meta kernel: the first step will tell
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            reason = " ".join(str(error).split())
            if count == 1 and "more than 1 value per channel" in reason:
                raise ValueError(
                    "batch_size must leave at least 2 images in every step for BatchNorm, but there is a step of one: "
                    "another --batch-size or --device-train-microbatch-size avoids it"
                ) from error
            raise ValueError(
                f"image_size must be one that {type(network).__name__} takes, got {image_size}: {reason}"
            ) from error


def _drop_path_argument(options: ModelOptions) -> dict[str, Any]:
    """The argument of the network's constructor with its drop-path rate."""
    rate = options.drop_path_rate
    if rate is None:
        return {}
    if not 0 < rate < 1:
        raise ValueError(f"drop_path_rate must be in (0, 1), got {rate}")
    if options.model.startswith("timm:"):
        return {"drop_path_rate": rate}
    from torchvision import models

    known = options.model in models.list_models(module=models)
    if known and _takes_drop_path(models.get_model_builder(options.model)):
        return {"stochastic_depth_prob": rate}
    raise ValueError(
        f"drop_path_rate must come with a network that has drop paths, {options.model} has none; drop_rate is for "
        "every residual network"
    )


def _takes_drop_path(builder: Any) -> bool:
    return "stochastic_depth_prob" in inspect.getsource(inspect.unwrap(builder))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
