"""Networks for images, by name; weights from files; a classifier around any network; export."""

from .cifar_resnet import CIFARBasicBlock, CIFARResNet, cifar_resnet
from .classifier import ComposerClassifier
from .composer_model import ComposerModel
from .create_model import create_model
from .export import export_network
from .head import find_head
from .resnet import composer_resnet
from .weights import LoadedWeights, load_weights_partly, read_state_dict

__all__ = [
    "CIFARBasicBlock",
    "CIFARResNet",
    "ComposerClassifier",
    "ComposerModel",
    "LoadedWeights",
    "cifar_resnet",
    "composer_resnet",
    "create_model",
    "export_network",
    "find_head",
    "load_weights_partly",
    "read_state_dict",
]
