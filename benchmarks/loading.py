"""Images per second of the folder loader and of a plain torchvision ImageFolder with the same transforms.

Both read the same JPEGs with the same number of workers, in turns: the speed of a machine that other programs use
changes from minute to minute.

    python benchmarks/loading.py [--images 1500] [--rounds 5] [--workers 2]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from etude.datasets import eval_transform, image_folder_dataloaders, train_transform
from etude.datasets.normalization import IMAGENET_MEAN, IMAGENET_STD
from etude.trainer.data import EpochReader

IMAGE_SIZE, BATCH_SIZE = 224, 32


def write_images(folder: Path, num_images: int) -> None:
    """JPEGs of ImageNet's usual size, half for training and half for evaluation, in two classes."""
    generator = np.random.default_rng(0)
    for number in range(num_images):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        path = folder / ("train" if number % 2 else "val") / f"class{number // 2 % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def images_per_second(batches: Iterable[Any], num_images: int) -> float:
    """From the start of the workers to the last batch."""
    started = time.perf_counter()
    count = sum(len(targets) for _, targets in batches)
    assert count == num_images, count
    return count / (time.perf_counter() - started)


def read_as_trained(dataloader: DataLoader[Any]) -> Iterable[Any]:
    """The batches as the Trainer reads them, with seeds for every image."""
    reader = EpochReader(dataloader, name="train_dataloader", seed=0, for_training=True)
    return (batch for batch, _ in reader.batches(0))


def main() -> None:
    """Print the speeds of every round, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, options.images)
        data = image_folder_dataloaders(
            folder, BATCH_SIZE, IMAGE_SIZE, options.workers, augmentation="reference", persistent_workers=False
        )
        settings = {"num_workers": options.workers, "drop_last": True}
        transforms = {
            "train": train_transform("reference", IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD),
            "val": eval_transform(IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD),
        }
        for part, own in (("train", data.train_dataloader), ("val", data.eval_dataloader)):
            images = ImageFolder(str(folder / part), transforms[part])
            plain = DataLoader(images, BATCH_SIZE, shuffle=part == "train", **settings)
            count = len(plain) * BATCH_SIZE
            ratios, trained_ratios = [], []
            for number in range(options.rounds + 1):
                plain_speed, own_speed = images_per_second(plain, count), images_per_second(own, count)
                trained_speed = images_per_second(read_as_trained(own), count)
                if number == 0:
                    continue  # the files are not in memory yet
                ratios.append(own_speed / plain_speed)
                trained_ratios.append(trained_speed / plain_speed)
                print(
                    f"{part:5}  plain {plain_speed:6.1f}/s  folder loader {own_speed:6.1f}/s  read by the Trainer "
                    f"{trained_speed:6.1f}/s"
                )
            print(
                f"{part:5}  median ratio to plain: folder loader {statistics.median(ratios):.3f}, read by the Trainer "
                f"{statistics.median(trained_ratios):.3f}"
            )


if __name__ == "__main__":
    main()
