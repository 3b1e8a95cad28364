"""CIFAR-10 and CIFAR-100."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import datasets

from etude.datasets import ImageDataloaders, cifar10_dataloaders, cifar100_dataloaders
from helpers.image_writing import write_both_cifars

Load = Callable[..., ImageDataloaders]
sources = pytest.mark.parametrize(
    ("load", "source", "num_classes", "num_train"),
    [(cifar10_dataloaders, datasets.CIFAR10, 10, 20), (cifar100_dataloaders, datasets.CIFAR100, 100, 4)],
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_both_cifars(tmp_path, monkeypatch)


@sources
def test_the_images_are_read(folder: Path, load: Load, source: Any, num_classes: int, num_train: int) -> None:
    data = load(folder, batch_size=2, augmentation="none", normalization=((0, 0, 0), (1, 1, 1)))
    assert data.class_names == tuple(f"name {number}" for number in range(num_classes))
    assert data.image_size == 32
    assert len(data.train_dataloader.dataset) == num_train  # type: ignore[arg-type]  # it has a length
    own = source(folder, train=False)
    images, targets = (torch.cat(parts) for parts in zip(*data.eval_dataloader, strict=True))
    assert torch.allclose(images, torch.from_numpy(own.data).movedim(-1, 1) / 255)
    assert targets.tolist() == own.targets


@sources
def test_they_are_normalised_by_themselves(
    folder: Path, load: Load, source: Any, num_classes: int, num_train: int
) -> None:
    data = load(folder, augmentation="none")
    whole = torch.stack([data.train_dataloader.dataset[number][0] for number in range(num_train)])
    assert torch.allclose(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(whole.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)


def test_they_are_augmented_and_resized(folder: Path) -> None:
    data = cifar10_dataloaders(folder, batch_size=4, image_size=40)
    for loader in (data.train_dataloader, data.eval_dataloader):
        assert next(iter(loader))[0].shape == (4, 3, 40, 40)
    first, again = (data.train_dataloader.dataset[0][0] for _ in range(2))
    assert not torch.equal(first, again)
    first, again = (data.eval_dataloader.dataset[0][0] for _ in range(2))
    assert torch.equal(first, again)


@sources
def test_nothing_is_downloaded_unless_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, load: Load, source: Any, num_classes: int, num_train: int
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(f"{source.__mro__[0].__module__}.download_and_extract_archive", lambda *a, **k: asked.append(a))
    shutil.rmtree(folder / source.base_folder)
    with pytest.raises(FileNotFoundError, match=f"folder must hold {source.base_folder} .* download=True downloads it"):
        load(folder)
    assert not asked
    with pytest.raises(FileNotFoundError):
        load(folder, download=True)
    assert asked


def test_a_changed_file_is_refused(folder: Path) -> None:
    with open(folder / "cifar-10-batches-py" / "data_batch_3", "ab") as file:
        file.write(b"\0")
    with pytest.raises(FileNotFoundError, match="or the files were changed"):
        cifar10_dataloaders(folder)


@pytest.mark.parametrize("settings", [{"image_size": 4}, {"batch_size": 0}, {"normalization": 3}, {"augmentation": ""}])
def test_arguments_are_checked(folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        cifar10_dataloaders(folder, **settings)
