"""A folder of images with one folder per class, split for evaluation here or by its owner."""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..engine.checks import check_int, check_number
from .image_dataloaders import ImageDataloaders, LoaderSettings
from .image_files import ImageFiles, OnCorrupt, Sample, check_on_corrupt, for_statistics, readable
from .normalization import Normalization, check_normalization, resolve
from .transforms import Augmentation, check_image_size, check_resize_size, eval_transform, train_transform

_EVAL_NAMES = ("val", "valid", "validation", "test")
_EVAL_FRACTION = 0.2


def image_folder_dataloaders(
    folder: str | Path,
    batch_size: int = 32,
    image_size: int = 224,
    num_workers: int = 0,
    *,
    resize_size: int | None = None,
    augmentation: Augmentation = "reference",
    normalization: Normalization = "imagenet",
    eval_fraction: float | None = None,
    seed: int = 0,
    on_corrupt: OnCorrupt = "raise",
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
) -> ImageDataloaders:
    """Training and evaluation batches from a folder of images.

    The folder holds ``CLASS/IMAGE.jpg``, which are split here, or ``train/CLASS/IMAGE.jpg`` and
    ``val/CLASS/IMAGE.jpg`` (or ``valid``, ``validation``, ``test``). Classes are numbered in the order of their
    names in the training part. Images may lie in subfolders of their class; hidden folders and other files are
    ignored.

    Args:
        folder: The folder.
        batch_size: Images per batch, at least 1. An incomplete last training batch is dropped.
        image_size: Height and width of an image in pixels, at least 8.
        num_workers: Processes that load images, at least 0.
        resize_size: Of the shorter side of evaluation images before the centre is cropped; by default 8/7 of
            `image_size`.
        augmentation: Of the training images, as in `train_transform`.
        normalization: ``"imagenet"``, which pretrained networks expect, ``"data"`` for the statistics of up to 1,000
            training images, or ``(mean, std)``.
        eval_fraction: Share of the images of each class that is held out for evaluation, in (0, 1); by default 0.2.
            At least one image of each class is held out, and one is trained on.
        seed: Of the split, in [0, 2**32).
        on_corrupt: ``"raise"`` an error that names the file when it is read, or ``"skip"``: read every image once
            now, and leave out those that cannot be read.
        pin_memory: By default, whether there is a GPU.
        persistent_workers: By default, whether there are workers.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If an argument is invalid, the folder has no images in folders of at least two classes, a
            class is empty or has too few images to be split, or the evaluation has classes that training lacks.
    """
    loaders = LoaderSettings(
        batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent_workers
    )
    check_image_size(image_size)
    resize_size = check_resize_size(resize_size, image_size)
    normalization = check_normalization(normalization)
    check_on_corrupt(on_corrupt)
    _check_split(eval_fraction, seed)
    found = _find(Path(folder), eval_fraction, seed)
    num_skipped = 0
    if on_corrupt == "skip":
        found, num_skipped = _skip_corrupt(found, max(1, num_workers))
    mean, std = resolve(normalization, lambda: for_statistics(found.train, image_size, resize_size))
    train = ImageFiles(found.train, train_transform(augmentation, image_size, mean, std, resize_size=resize_size))
    evaluation = ImageFiles(found.evaluation, eval_transform(image_size, mean, std, resize_size=resize_size))
    return ImageDataloaders(
        *loaders.dataloaders(train, evaluation), found.class_names, image_size, mean, std, num_skipped
    )


def labelled_images_dataloader(
    folder: str | Path,
    class_names: Sequence[str],
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """All images of a folder with their classes, to evaluate a network on.

    The folder holds ``CLASS/IMAGE.jpg``, or such folders in ``val`` (or ``valid``, ``validation``, ``test``). It may
    lack some classes.

    Args:
        folder: The folder.
        class_names: Of each class number of the network.
        transform: Of an image of PIL in RGB.
        batch_size: Images per batch, at least 1.
        num_workers: Processes that load images, at least 0.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If an argument is invalid, or the folder has a class that is not in `class_names`.
    """
    loaders = LoaderSettings(batch_size=batch_size, num_workers=num_workers)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a folder of images, there is none at {folder}")
    parts = _class_folders(folder)
    held_out = next((name for name in _EVAL_NAMES if name in parts and name not in class_names), None)
    classes = _list_classes(folder if held_out is None else folder / held_out, least=1)
    if unknown := [name for name in classes if name not in class_names]:
        raise ValueError(f"{folder} must have classes of the network only, it has {_listed(unknown)} besides")
    return loaders.in_order(ImageFiles(_samples(classes, class_names), transform))


def list_images(folder: Path) -> list[str]:
    """The paths of the images in a folder and its subfolders, in order; hidden files and folders are ignored."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = sorted(name for name in files if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."))
        found += [os.path.join(parent, name) for name in images]
    return found


class _Found(NamedTuple):
    class_names: tuple[str, ...]
    train: list[Sample]
    evaluation: list[Sample]


def _find(folder: Path, eval_fraction: float | None, seed: int) -> _Found:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be a folder of images, there is none at {folder}")
    parts = _class_folders(folder)
    held_out = next((name for name in _EVAL_NAMES if name in parts), None)
    if "train" not in parts or held_out is None or not _class_folders(folder / "train"):
        return _split(_list_classes(folder), _EVAL_FRACTION if eval_fraction is None else eval_fraction, seed)
    if eval_fraction is not None:
        raise ValueError(
            f"eval_fraction must not be given where the folder is split into train and {held_out}, got {eval_fraction}"
        )
    train, evaluation = _list_classes(folder / "train"), _list_classes(folder / held_out, least=1)
    if unknown := [name for name in evaluation if name not in train]:
        raise ValueError(
            f"{folder / held_out} must have classes of {folder / 'train'} only, it has {_listed(unknown)} besides"
        )
    names = tuple(train)
    return _Found(names, _samples(train, names), _samples(evaluation, names))


def _list_classes(folder: Path, least: int = 2) -> dict[str, list[str]]:
    """The paths of the images of each class, both in order."""
    classes = {name: list_images(folder / name) for name in _class_folders(folder)}
    if not any(classes.values()):
        raise ValueError(
            f"{folder} must hold one folder of images for each class, it has "
            + (f"no images in {_listed(list(classes))}" if classes else "no folders")
            + f" (images end with {', '.join(IMG_EXTENSIONS)})"
        )
    if empty := [name for name, images in classes.items() if not images]:
        raise ValueError(f"{folder} must have images of every class, there are none in {_listed(empty)}")
    if len(classes) < least:
        raise ValueError(f"{folder} must have folders of at least {least} classes, it has only {next(iter(classes))}")
    return classes


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _split(classes: dict[str, list[str]], eval_fraction: float, seed: int) -> _Found:
    """Hold out a share of every class, chosen by the seed and the name of the class."""
    if single := [name for name, images in classes.items() if len(images) < 2]:
        raise ValueError(
            f"every class must have at least 2 images, to train on and to evaluate, there is only one of "
            f"{_listed(single)}"
        )
    train, evaluation = {}, {}
    for name, images in classes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        count = min(max(round(eval_fraction * len(images)), 1), len(images) - 1)
        held_out = set(torch.randperm(len(images), generator=generator)[:count].tolist())
        evaluation[name] = [image for number, image in enumerate(images) if number in held_out]
        train[name] = [image for number, image in enumerate(images) if number not in held_out]
    names = tuple(classes)
    return _Found(names, _samples(train, names), _samples(evaluation, names))


def _samples(classes: dict[str, list[str]], names: Sequence[str]) -> list[Sample]:
    numbers = {name: number for number, name in enumerate(names)}
    return [(image, numbers[name]) for name, images in classes.items() for image in images]


def _skip_corrupt(found: _Found, num_threads: int) -> tuple[_Found, int]:
    train, evaluation = readable(found.train, num_threads), readable(found.evaluation, num_threads)
    left = {number for _, number in train}
    if lost := [name for number, name in enumerate(found.class_names) if number not in left]:
        raise ValueError(f"every class must have an image that can be read, there is none in {_listed(lost)}")
    if not evaluation:
        raise ValueError("at least one evaluation image must be readable, there is none")
    num_skipped = len(found.train) + len(found.evaluation) - len(train) - len(evaluation)
    return _Found(found.class_names, train, evaluation), num_skipped


def _check_split(eval_fraction: float | None, seed: int) -> None:
    if eval_fraction is not None:
        check_number("eval_fraction", eval_fraction, gt=0, lt=1)
    check_int("seed", seed, ge=0, lt=2**32)


def _listed(names: Sequence[str]) -> str:
    """Some names for an error, not hundreds."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
