"""``--data``: what the word names, what holds for it by default, and its dataloaders."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import DataOptions

if TYPE_CHECKING:
    from ..datasets import ImageDataloaders

_FROM_FILES = {"image_size": 224, "augmentation": "reference", "normalization": "imagenet"}
_CIFAR = {"image_size": 32, "augmentation": "crop_flip", "normalization": "data"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"image_size": 32, "num_workers": 0},
    "synthetic": {"image_size": 224, "num_workers": 0},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "imagenet": _FROM_FILES,
    "folder": _FROM_FILES,
}
_ONLY_FOR = {
    "resize_size": ("folder", "imagenet"),
    "augmentation": ("folder", "imagenet", "cifar10", "cifar100"),
    "normalization": ("folder", "imagenet", "cifar10", "cifar100"),
    "eval_fraction": ("folder",),
    "split_seed": ("folder",),
    "on_corrupt": ("folder",),
    "download": ("cifar10", "cifar100"),
}
_MAX_WORKERS = 8


@dataclass(frozen=True)
class Source:
    """What ``--data`` names.

    Args:
        kind: digits, synthetic, cifar10, cifar100, imagenet or folder.
        folder: The absolute path of the data; None for digits and synthetic images.
        num_classes: Of synthetic images.
    """

    kind: str
    folder: Path | None = None
    num_classes: int | None = None

    def __str__(self) -> str:
        if self.kind == "folder":
            return str(self.folder)
        detail = self.folder or self.num_classes
        return self.kind if detail is None else f"{self.kind}:{detail}"


def read_source(data: str) -> Source:
    """What `data` names.

    Raises:
        ValueError: If it is no known word, or no path.
    """
    kind, _, detail = data.partition(":")
    if kind == "digits" and not detail:
        return Source(kind)
    if kind == "synthetic":
        if detail and (not detail.isdecimal() or int(detail) < 2):
            raise ValueError(f"data must be synthetic:CLASSES with at least 2 classes, got {data!r}")
        return Source(kind, num_classes=int(detail or 1000))
    if kind in ("cifar10", "cifar100"):
        return Source(kind, Path(detail or "data").absolute())
    if kind == "imagenet":
        if not detail:
            raise ValueError("data must be imagenet:FOLDER, got 'imagenet'")
        return Source(kind, Path(detail).absolute())
    path = Path(data).absolute()
    if not data or not path.is_dir():
        raise ValueError(
            "data must be an existing folder of images, digits, cifar10, cifar100, imagenet:FOLDER or synthetic, "
            f"got {data!r}"
        )
    return Source("folder", path)


def resolve(options: DataOptions) -> DataOptions:
    """The options with their defaults for this kind of data, and with an absolute path.

    Raises:
        ValueError: If an option has no effect on this kind of data, or `data` is no such thing.
    """
    source = read_source(options.data)
    for option in fields(options):
        value = getattr(options, option.name)
        if value != option.default and source.kind not in _ONLY_FOR.get(option.name, (source.kind,)):
            raise ValueError(f"{option.name} has no effect on {source.kind}, got {value!r}")
    defaults = {"num_workers": _num_cpus(), **_DEFAULTS[source.kind]}
    unset = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, data=str(source), **unset)


def load_data(options: DataOptions, batch_size: int) -> ImageDataloaders:
    """The dataloaders of resolved options.

    Raises:
        ValueError: If an option is invalid or the data are not what it names.
        FileNotFoundError: If the data are not there.
    """
    from .. import datasets

    source = read_source(options.data)
    sizes: dict[str, Any] = {
        "batch_size": batch_size,
        "image_size": options.image_size,
        "num_workers": options.num_workers,
    }
    if source.kind == "digits":
        return datasets.digits_dataloaders(**sizes)
    if source.kind == "synthetic":
        assert source.num_classes is not None, "read_source sets it"
        return datasets.synthetic_dataloaders(**sizes, num_classes=source.num_classes)
    assert source.folder is not None, "read_source sets it"
    pixels: dict[str, Any] = {"augmentation": options.augmentation, "normalization": options.normalization}
    if source.kind == "imagenet":
        return datasets.imagenet_dataloaders(source.folder, **sizes, **pixels, resize_size=options.resize_size)
    if source.kind == "folder":
        return datasets.image_folder_dataloaders(
            source.folder,
            **sizes,
            **pixels,
            resize_size=options.resize_size,
            eval_fraction=options.eval_fraction,
            seed=options.split_seed,
            on_corrupt=options.on_corrupt,
        )
    load = datasets.cifar10_dataloaders if source.kind == "cifar10" else datasets.cifar100_dataloaders
    return load(source.folder, **sizes, **pixels, download=options.download)


def eval_resize_size(options: DataOptions) -> int:
    """Of the shorter side of an evaluation image, before its centre is cropped."""
    assert options.image_size is not None, "resolve sets it"
    if read_source(options.data).kind not in _ONLY_FOR["resize_size"]:
        return options.image_size
    return options.resize_size or round(options.image_size * 8 / 7)


def _num_cpus() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MAX_WORKERS)
