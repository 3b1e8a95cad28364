"""The 1,797 handwritten digits that come with scikit-learn, as images."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from .image_dataloaders import ImageDataloaders, LoaderSettings
from .transforms import check_image_size


def digits_dataloaders(batch_size: int = 32, image_size: int = 32, num_workers: int = 0) -> ImageDataloaders:
    """Dataloaders of handwritten digits (Alpaydin and Kaynak 1998, UCI repository).

    The split is fixed and stratified: 1,437 training and 360 test images. The 8x8 grey images are resized, repeated
    to three channels, and normalized with the mean and standard deviation of the training images.

    Args:
        batch_size: Images per batch, at least 1.
        image_size: Height and width of an image in pixels, at least 8.
        num_workers: Worker processes of each dataloader, at least 0.

    Raises:
        ValueError: If an argument is invalid.
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    LoaderSettings(batch_size=batch_size, num_workers=num_workers)
    check_image_size(image_size)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, classes = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    chosen = train_test_split(range(len(classes)), test_size=0.2, stratify=data.target, random_state=0)
    train, test = (torch.tensor(part) for part in chosen)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    images = F.interpolate(images[:, None], size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = images.expand(-1, 3, -1, -1)
    training, held_out = (TensorDataset(images[part], classes[part]) for part in (train, test))
    statistics = [(value / 16,) * 3 for value in (mean.item(), std.item())]  # of pixels from 0 to 16
    return ImageDataloaders(
        DataLoader(training, batch_size, shuffle=True, num_workers=num_workers),
        DataLoader(held_out, 4 * batch_size, num_workers=num_workers),
        tuple(str(name) for name in data.target_names),
        image_size,
        *statistics,  # type: ignore[arg-type]  # two triples
    )
