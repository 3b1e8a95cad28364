"""The ResNets of He et al. 2015 for images, from torchvision, ready to train."""

from typing import Any

from torch import nn
from torchvision import models

from .classifier import ComposerClassifier

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def composer_resnet(
    model_name: str,
    num_classes: int = 1000,
    weights: Any = None,
    zero_init_residual: bool = True,
) -> ComposerClassifier:
    """Build a ResNet classifier (He et al. 2015, arXiv:1512.03385).

    Args:
        model_name: One of ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``resnet152``.
        num_classes: Number of classes.
        weights: Pretrained weights as torchvision names them (``"IMAGENET1K_V2"``), or None for a
            random initialisation. With another number of classes the last layer starts anew.
        zero_init_residual: Start every block as the identity, by a zero in its last normalisation
            (Goyal et al. 2017, section 5.1, arXiv:1706.02677). Without effect on pretrained weights.

    Returns:
        A classifier for batches ``(X, y)`` with images ``X`` of shape ``(N, 3, H, W)``; the
        torchvision network is its ``.module``.

    Raises:
        ValueError: If the name is unknown.
    """
    if model_name not in RESNETS:
        raise ValueError(f"model_name must be one of {', '.join(RESNETS)}, got {model_name!r}")
    build = getattr(models, model_name)
    if weights is None:
        network = build(num_classes=num_classes, zero_init_residual=zero_init_residual)
    else:
        network = build(weights=weights)
        if network.fc.out_features != num_classes:
            network.fc = nn.Linear(network.fc.in_features, num_classes)
    return ComposerClassifier(network, num_classes)
