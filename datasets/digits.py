"""The 1,797 handwritten digits that scikit-learn ships, as images for a ResNet."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def digits_dataloaders(
    batch_size: int = 32, image_size: int = 32, num_workers: int = 0
) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Training and test batches of real handwritten digits (Alpaydin and Kaynak 1998, UCI repository).

    The split is fixed and stratified, 1,437 to 360 images. The 8x8 grey images are enlarged, given
    three equal channels, and normalised with mean and deviation of the training part.

    Args:
        batch_size: Images per batch, at least 1.
        image_size: Height and width of an image in pixels, at least 8.
        num_workers: Processes that load the images, at least 0.

    Returns:
        The shuffled training dataloader and the test dataloader; batches are ``(X, y)`` with images
        ``(N, 3, image_size, image_size)`` and classes ``(N,)`` from 0 to 9.

    Raises:
        ValueError: If an argument is below its minimum.
        ModuleNotFoundError: Without scikit-learn.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if image_size < 8:
        raise ValueError(f"image_size must be at least 8, the size of the originals, got {image_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images, classes = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    chosen = train_test_split(range(len(classes)), test_size=0.2, stratify=data.target, random_state=0)
    train, test = (torch.tensor(part) for part in chosen)
    images = (images - images[train].mean()) / images[train].std()
    images = F.interpolate(images[:, None], size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = images.expand(-1, 3, -1, -1)
    training, held_out = (TensorDataset(images[part], classes[part]) for part in (train, test))
    return (
        DataLoader(training, batch_size, shuffle=True, num_workers=num_workers),
        DataLoader(held_out, 4 * batch_size, num_workers=num_workers),
    )
