"""ImageNet (ILSVRC 2012) from a local folder."""

from pathlib import Path

from torchvision import datasets

from .image_dataloaders import ImageDataloaders, LoaderSettings
from .image_files import ImageFiles, for_statistics
from .normalization import Normalization, check_normalization, resolve
from .transforms import Augmentation, check_image_size, check_resize_size, eval_transform, train_transform


def imagenet_dataloaders(
    folder: str | Path,
    batch_size: int = 256,
    image_size: int = 224,
    num_workers: int = 0,
    *,
    resize_size: int | None = None,
    augmentation: Augmentation = "reference",
    normalization: Normalization = "imagenet",
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
) -> ImageDataloaders:
    """The 1,281,167 training and 50,000 validation images of ImageNet.

    torchvision reads the folder: with the archives of image-net.org in it, it unpacks them at the first use.
    A folder with ``train`` and ``val`` but without the archive of the development kit is read by
    `image_folder_dataloaders`, which names the classes by their WordNet numbers.

    Args:
        folder: Holds the archives, or ``meta.bin`` and the folders ``train`` and ``val`` that torchvision made of
            them.
        batch_size: Images per batch, at least 1. An incomplete last training batch is dropped.
        image_size: Height and width of an image in pixels, at least 8.
        num_workers: Processes that load images, at least 0.
        resize_size: Of the shorter side of validation images before the centre is cropped; by default 8/7 of
            `image_size`.
        augmentation: Of the training images, as in `train_transform`.
        normalization: ``"imagenet"``, ``"data"`` for the statistics of 1,000 training images, or ``(mean, std)``.
        pin_memory: By default, whether there is a GPU.
        persistent_workers: By default, whether there are workers.

    Raises:
        FileNotFoundError: If the folder does not hold ImageNet.
        ValueError: If an argument is invalid.
    """
    loaders = LoaderSettings(
        batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, persistent_workers=persistent_workers
    )
    check_image_size(image_size)
    resize_size = check_resize_size(resize_size, image_size)
    normalization = check_normalization(normalization)
    try:
        train, val = (datasets.ImageNet(folder, split=split) for split in ("train", "val"))
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"folder must hold the archives of ImageNet, or meta.bin, train and val that torchvision made of them, "
            f"{folder} does not ({error})"
        ) from error
    mean, std = resolve(normalization, lambda: for_statistics(train.samples, image_size, resize_size))
    class_names = tuple(names[0] for names in train.classes)
    return ImageDataloaders(
        *loaders.dataloaders(
            ImageFiles(train.samples, train_transform(augmentation, image_size, mean, std, resize_size=resize_size)),
            ImageFiles(val.samples, eval_transform(image_size, mean, std, resize_size=resize_size)),
        ),
        class_names,
        image_size,
        mean,
        std,
    )
