"""The ResNets of He et al. 2015, from torchvision, as classifiers for the Trainer."""

from enum import Enum

from .classifier import ComposerClassifier
from .create_model import create_model

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def composer_resnet(
    model_name: str,
    num_classes: int = 1000,
    weights: str | Enum | None = None,
    zero_init_residual: bool = True,
) -> ComposerClassifier:
    """Build a ResNet classifier (He et al. 2015, arXiv:1512.03385).

    Args:
        model_name: One of ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``resnet152``.
        num_classes: Number of classes.
        weights: Pretrained weights by torchvision's name (``"IMAGENET1K_V1"``; ResNet-50 and deeper also have
            ``"IMAGENET1K_V2"``) or enum member, or None for a random initialisation. With another number of
            classes the last layer is initialised randomly.
        zero_init_residual: Start every block as the identity, by a zero in its last normalisation
            (Goyal et al. 2017, section 5.1, arXiv:1706.02677). Without effect on pretrained weights.

    Returns:
        A classifier for batches ``(X, y)`` with images ``X`` of shape ``(N, 3, H, W)``; the
        torchvision network is its ``.module``.

    Raises:
        ValueError: If there is no such network or it has no such weights.
    """
    if model_name not in RESNETS:
        raise ValueError(f"model_name must be one of {', '.join(RESNETS)}, got {model_name!r}")
    if weights is None:
        network = create_model(model_name, num_classes, zero_init_residual=zero_init_residual)
    else:
        network = create_model(model_name, num_classes, weights=weights.name if isinstance(weights, Enum) else weights)
    return ComposerClassifier(network, num_classes)
