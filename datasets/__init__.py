"""Real images to train on, as dataloaders, with what is known of them."""

from .cifar import cifar10_dataloaders, cifar100_dataloaders
from .digits import digits_dataloaders
from .image_dataloaders import ImageDataloaders
from .image_files import images_dataloader
from .image_folder import image_folder_dataloaders, labelled_images_dataloader
from .imagenet import imagenet_dataloaders
from .synthetic import synthetic_dataloaders
from .transforms import eval_transform, train_transform

__all__ = [
    "ImageDataloaders",
    "cifar10_dataloaders",
    "cifar100_dataloaders",
    "digits_dataloaders",
    "eval_transform",
    "image_folder_dataloaders",
    "imagenet_dataloaders",
    "images_dataloader",
    "labelled_images_dataloader",
    "synthetic_dataloaders",
    "train_transform",
]
