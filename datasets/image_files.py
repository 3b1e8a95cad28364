"""Images in files, with their classes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .image_dataloaders import LoaderSettings

Sample = tuple[str, int]  # the path of an image, and the number of its class
OnCorrupt = Literal["raise", "skip"]

_NUM_FOR_STATISTICS = 1000


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images that are read when they are asked for.

    Args:
        samples: Path and class number of each image.
        transform: Of an image of PIL in RGB.
    """

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Any], Tensor]) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        return self.transform(read_image(path)), target


class UnlabelledImages(Dataset[Tensor]):
    """Images without classes, read when they are asked for.

    Args:
        paths: Of the images.
        transform: Of an image of PIL in RGB.
    """

    def __init__(self, paths: Sequence[str], transform: Callable[[Any], Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(read_image(self.paths[index]))


def images_dataloader(
    paths: Sequence[str], transform: Callable[[Any], Tensor], *, batch_size: int = 32, num_workers: int = 0
) -> DataLoader[Tensor]:
    """Batches of images without classes, in the order of `paths`.

    Args:
        paths: Of the images.
        transform: Of an image of PIL in RGB.
        batch_size: Images per batch, at least 1.
        num_workers: Processes that load images, at least 0.

    Raises:
        ValueError: If an argument is invalid.
    """
    loaders = LoaderSettings(batch_size=batch_size, num_workers=num_workers)
    return loaders.in_order(UnlabelledImages(paths, transform))


def read_image(path: str | Path) -> Image.Image:
    """Read an image in RGB.

    Raises:
        OSError: If it cannot be decoded; it names the file.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # damage makes decoders raise nearly anything
        raise OSError(
            f"{path} cannot be read as an image ({error}); on_corrupt='skip' of an image folder leaves it out"
        ) from error


def check_on_corrupt(on_corrupt: str) -> None:
    """Validate `on_corrupt`: ``"raise"`` or ``"skip"``."""
    if on_corrupt not in ("raise", "skip"):
        raise ValueError(f"on_corrupt must be 'raise' or 'skip', got {on_corrupt!r}")


def readable(samples: Sequence[Sample], num_threads: int) -> list[Sample]:
    """The samples whose images can be read. Each is read once, so that batches are the same in every epoch."""
    with ThreadPoolExecutor(num_threads) as executor:
        are_readable = executor.map(_is_readable, (path for path, _ in samples))
        return [sample for sample, is_readable in zip(samples, are_readable, strict=True) if is_readable]


def for_statistics(samples: Sequence[Sample], image_size: int, resize_size: int) -> Iterator[Tensor]:
    """Up to 1,000 of the images, evenly spaced, as the evaluation crops them, of dtype uint8."""
    transform = v2.Compose([v2.Resize(resize_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    step = -(-len(samples) // _NUM_FOR_STATISTICS)
    for path, _ in samples[::step]:
        yield transform(read_image(path))


def _is_readable(path: str) -> bool:
    try:
        read_image(path)
    except OSError:
        return False
    return True
