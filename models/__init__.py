"""Networks for images, by name; a classifier around any network; export."""

from .cifar_resnet import CIFARBasicBlock, CIFARResNet, cifar_resnet
from .classifier import ComposerClassifier
from .create_model import create_model
from .export import export_network
from .resnet import composer_resnet

__all__ = [
    "CIFARBasicBlock",
    "CIFARResNet",
    "ComposerClassifier",
    "cifar_resnet",
    "composer_resnet",
    "create_model",
    "export_network",
]
