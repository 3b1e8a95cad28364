"""Small image files in the formats of the datasets."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets


def write_image(path: Path, colour: int = 0, size: tuple[int, int] = (20, 16), seed: int = 0) -> Path:
    """An image whose red channel is about `colour`, with noise that compresses badly."""
    noise = np.random.default_rng(seed).integers(0, 20, (size[1], size[0], 3), dtype=np.uint8)
    noise[..., 0] += np.uint8(colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)
    return path


def write_folder(folder: Path, counts: dict[str, int]) -> Path:
    """Folders of so many images; the red channel of a class is 40 times its place in the dictionary."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(count):
            write_image(folder / name / f"{image:03}.png", colour=40 * number % 240, seed=image)
    return folder


def truncate(path: Path) -> None:
    """Cut an image in its middle, where its size and kind can still be read."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_cifar(folder: Path, num_classes: int) -> dict[str, str]:
    """Batches of CIFAR's Python version, 4 images each.

    Returns:
        The MD5 of each file.
    """
    folder.mkdir(parents=True)
    label = "labels" if num_classes == 10 else "fine_labels"
    files = (
        [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"] if num_classes == 10 else ["train", "test"]
    )
    names = [f"name {number}" for number in range(num_classes)]
    contents = {}
    for seed, file in enumerate(files):
        generator = np.random.default_rng(seed)
        pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        contents[file] = {"data": pixels, label: generator.integers(0, num_classes, 4).tolist()}
    meta = ("batches.meta", "label_names") if num_classes == 10 else ("meta", "fine_label_names")
    contents[meta[0]] = {meta[1]: names}
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content, 2))
    return {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in contents}


def write_both_cifars(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 and CIFAR-100 with a few images; torchvision, which checks every file by its MD5, accepts them."""
    for source, num_classes in ((datasets.CIFAR10, 10), (datasets.CIFAR100, 100)):
        digests = write_cifar(folder / source.base_folder, num_classes)
        for name in ("train_list", "test_list"):
            files = [[file, digests[file]] for file, _ in getattr(source, name)]
            monkeypatch.setattr(source, name, files)
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": digests[source.meta["filename"]]})
        monkeypatch.setattr(source, "url", "http://localhost:1/nothing")
    return folder


def write_imagenet(folder: Path, counts: dict[str, int]) -> Path:
    """``train`` and ``val`` by WordNet numbers, and ``meta.bin``, as torchvision unpacks the archives."""
    for split in ("train", "val"):
        write_folder(folder / split, counts)
    names = {wnid: (f"{wnid} name", "another name") for wnid in counts}
    torch.save((names, list(counts)), folder / "meta.bin")
    return folder
