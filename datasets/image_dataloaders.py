"""What every dataset here gives: dataloaders, and what is known of the images and classes."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from ..engine.checks import check_int


@dataclass(frozen=True)
class ImageDataloaders:
    """Batches for training and evaluation, and what is known of them.

    Args:
        train_dataloader: Yields ``(X, y)`` with images ``(N, 3, image_size, image_size)`` and classes ``(N,)``.
        eval_dataloader: The same, in a fixed order.
        class_names: Of each class number.
        image_size: Height and width of an image in pixels.
        mean: Of each channel, in [0, 1], as it was subtracted.
        std: Of each channel, by which the difference was divided.
        num_skipped: How many images were left out because they could not be read.
    """

    train_dataloader: DataLoader[Any]
    eval_dataloader: DataLoader[Any]
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_skipped: int = 0

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How batches are loaded; the arguments are those of a torch DataLoader.

    Args:
        batch_size: Images per training batch.
        num_workers: Processes that load images.
        pin_memory: By default, whether there is a GPU.
        persistent_workers: By default, whether there are workers.

    Raises:
        ValueError: If a number is too small, or `persistent_workers` has no workers.
    """

    batch_size: int
    num_workers: int = 0
    pin_memory: bool | None = None
    persistent_workers: bool | None = None

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, ge=1)
        check_int("num_workers", self.num_workers, ge=0)
        if self.persistent_workers and self.num_workers == 0:
            raise ValueError("persistent_workers=True must come with num_workers >= 1, got 0")

    def dataloaders(self, train: Dataset[Any], evaluation: Dataset[Any]) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """A shuffled dataloader without an incomplete last batch, and one in order.

        A last batch of a single image would break BatchNorm. Fewer images than a batch are one batch.
        """
        drop_last = len(cast(Sized, train)) >= self.batch_size
        return (
            DataLoader(train, self.batch_size, shuffle=True, drop_last=drop_last, **self._options()),
            self.in_order(evaluation),
        )

    def in_order(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        """A dataloader of all samples in their order."""
        return DataLoader(dataset, self.batch_size, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            "persistent_workers": self.num_workers > 0 if self.persistent_workers is None else self.persistent_workers,
        }
