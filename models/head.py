"""The last layer of a classifier."""

from torch import nn


def find_head(network: nn.Module, num_classes: int) -> str:
    """The name of the last layer with an output per class.

    Args:
        network: Maps images to logits ``(N, num_classes)``.
        num_classes: Number of classes.

    Raises:
        ValueError: If no linear or convolutional layer has so many outputs.
    """
    found = [
        name
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == num_classes)
        or (isinstance(module, nn.Conv2d) and module.out_channels == num_classes)
    ]
    if not found:
        raise ValueError(f"{type(network).__name__} must have a last layer of {num_classes} classes, none was found")
    return found[-1]
