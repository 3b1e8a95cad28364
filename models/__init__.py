"""Networks to train: the ResNets for images, the CIFAR ResNets, and a classifier around any module."""

from .cifar_resnet import CIFARBasicBlock, CIFARResNet, cifar_resnet
from .classifier import ComposerClassifier
from .resnet import composer_resnet

__all__ = ["CIFARBasicBlock", "CIFARResNet", "ComposerClassifier", "cifar_resnet", "composer_resnet"]
