"""CIFAR-10 and CIFAR-100 from a local folder (Krizhevsky 2009)."""

from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from .image_dataloaders import ImageDataloaders, LoaderSettings
from .normalization import Normalization, check_normalization, resolve
from .transforms import Augmentation, check_image_size, eval_transform, train_transform


def cifar10_dataloaders(
    folder: str | Path,
    batch_size: int = 128,
    image_size: int = 32,
    num_workers: int = 0,
    *,
    augmentation: Augmentation = "crop_flip",
    normalization: Normalization = "data",
    download: bool = False,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
) -> ImageDataloaders:
    """The 50,000 training and 10,000 test images of CIFAR-10.

    Args:
        folder: Holds ``cifar-10-batches-py``, as the archive of the Python version unpacks.
        batch_size: Images per batch, at least 1. An incomplete last training batch is dropped.
        image_size: Height and width of an image in pixels, at least 8; other images than 32 are resized.
        num_workers: Processes that load images, at least 0.
        augmentation: Of the training images, as in `train_transform`; by default that of He et al. 2016.
        normalization: ``"data"`` for the statistics of the training images, ``"imagenet"`` or ``(mean, std)``.
        download: Whether to download the images where they are not in `folder`.
        pin_memory: By default, whether there is a GPU.
        persistent_workers: By default, whether there are workers.

    Raises:
        FileNotFoundError: If the images are not in `folder`, or were changed.
        ValueError: If an argument is invalid.
    """
    return _load(
        datasets.CIFAR10,
        folder,
        LoaderSettings(
            batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent_workers
        ),
        image_size=image_size,
        augmentation=augmentation,
        normalization=normalization,
        download=download,
    )


def cifar100_dataloaders(
    folder: str | Path,
    batch_size: int = 128,
    image_size: int = 32,
    num_workers: int = 0,
    *,
    augmentation: Augmentation = "crop_flip",
    normalization: Normalization = "data",
    download: bool = False,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
) -> ImageDataloaders:
    """The 50,000 training and 10,000 test images of CIFAR-100, with its 100 fine classes.

    Args:
        folder: Holds ``cifar-100-python``, as the archive of the Python version unpacks.
        batch_size: Images per batch, at least 1. An incomplete last training batch is dropped.
        image_size: Height and width of an image in pixels, at least 8; other images than 32 are resized.
        num_workers: Processes that load images, at least 0.
        augmentation: Of the training images, as in `train_transform`; by default that of He et al. 2016.
        normalization: ``"data"`` for the statistics of the training images, ``"imagenet"`` or ``(mean, std)``.
        download: Whether to download the images where they are not in `folder`.
        pin_memory: By default, whether there is a GPU.
        persistent_workers: By default, whether there are workers.

    Raises:
        FileNotFoundError: If the images are not in `folder`, or were changed.
        ValueError: If an argument is invalid.
    """
    return _load(
        datasets.CIFAR100,
        folder,
        LoaderSettings(
            batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent_workers
        ),
        image_size=image_size,
        augmentation=augmentation,
        normalization=normalization,
        download=download,
    )


def _load(
    source: type[Any],
    folder: str | Path,
    loaders: LoaderSettings,
    *,
    image_size: int,
    augmentation: Augmentation,
    normalization: Normalization,
    download: bool,
) -> ImageDataloaders:
    check_image_size(image_size)
    normalization = check_normalization(normalization)
    try:
        train, test = (source(folder, train=is_train, download=download) for is_train in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"folder must hold {source.base_folder} as the archive of {source.__name__} unpacks, {folder} does not, or "
            "the files were changed; download=True downloads it there"
        ) from error
    for part in (train, test):
        if wrong := [target for target in part.targets if not 0 <= target < len(part.classes)]:
            raise ValueError(f"folder must hold classes from 0 to {len(part.classes) - 1} only, it has {wrong[0]}")
    mean, std = resolve(normalization, lambda: [torch.from_numpy(train.data).movedim(-1, -3)])
    train.transform = train_transform(augmentation, image_size, mean, std, resize_size=image_size)
    test.transform = eval_transform(image_size, mean, std, resize_size=image_size)
    return ImageDataloaders(*loaders.dataloaders(train, test), tuple(train.classes), image_size, mean, std)
