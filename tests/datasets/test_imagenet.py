"""ImageNet."""

from pathlib import Path

import pytest
import torch

from etude.datasets import image_folder_dataloaders, imagenet_dataloaders
from etude.datasets.normalization import IMAGENET_MEAN, IMAGENET_STD
from helpers.image_writing import truncate, write_folder, write_imagenet

COUNTS = {"n01440764": 3, "n01443537": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path / "imagenet", COUNTS)


def test_the_images_and_the_names_of_the_classes_are_read(folder: Path) -> None:
    data = imagenet_dataloaders(folder, batch_size=2, image_size=16)
    assert data.class_names == ("n01440764 name", "n01443537 name")
    assert (data.mean, data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    images, targets = (torch.cat(parts) for parts in zip(*data.eval_dataloader, strict=True))
    assert images.shape == (5, 3, 16, 16)
    assert targets.tolist() == [0, 0, 0, 1, 1]
    assert [len(targets) for _, targets in data.train_dataloader] == [2, 2]


def test_it_gives_the_images_of_a_plain_folder(folder: Path) -> None:
    settings = {"batch_size": 5, "image_size": 16, "augmentation": "none", "normalization": "data"}
    imagenet = imagenet_dataloaders(folder, **settings)  # type: ignore[arg-type]
    plain = image_folder_dataloaders(folder, **settings)  # type: ignore[arg-type]
    assert (imagenet.mean, imagenet.std) == (plain.mean, plain.std)
    for one, other in zip(imagenet.eval_dataloader, plain.eval_dataloader, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_a_corrupt_image_is_named(folder: Path) -> None:
    truncate(folder / "val" / "n01443537" / "001.png")
    data = imagenet_dataloaders(folder, batch_size=2, image_size=16)
    with pytest.raises(OSError, match=r"val/n01443537/001\.png cannot be read as an image"):
        list(data.eval_dataloader)


def test_a_folder_without_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder must hold the archives of ImageNet, or meta\.bin"):
        imagenet_dataloaders(tmp_path)
    write_folder(tmp_path / "train", COUNTS)
    with pytest.raises(FileNotFoundError, match=r"folder must hold the archives of ImageNet, or meta\.bin"):
        imagenet_dataloaders(tmp_path)
