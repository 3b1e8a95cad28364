"""The digits of scikit-learn."""

from collections import Counter
from typing import Any, cast

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from etude.datasets.digits import digits_dataloaders


def loaders(**settings: Any) -> list[DataLoader[Any]]:
    data = digits_dataloaders(**settings)
    return [data.train_dataloader, data.eval_dataloader]


@pytest.fixture(scope="module")
def parts():
    """Images and classes of the training and of the test part, at the size of the originals."""
    return [cast(TensorDataset, loader.dataset).tensors for loader in loaders(image_size=8)]


def originals(images, lowest, highest) -> list[tuple]:
    """The grey values from 0 to 16 that the images were made of."""
    return [tuple(row) for row in ((images[:, 0] - lowest) / (highest - lowest) * 16).round().int().flatten(1).tolist()]


def test_the_sizes_of_the_parts(parts):
    assert [len(images) for images, _ in parts] == [1437, 360]
    assert [len(classes) for _, classes in parts] == [1437, 360]


def test_images_have_three_equal_channels(parts):
    for images, _ in parts:
        assert images.shape[1:] == (3, 8, 8)
        assert torch.equal(images, images[:, :1].expand_as(images))


def test_the_parts_are_disjoint_and_together_everything(parts):
    """All digits differ, so a set of pictures tells them apart."""
    data = load_digits()
    lowest, highest = parts[0][0].min(), parts[0][0].max()
    everything = Counter(
        (*pixels, int(digit))
        for images, classes in parts
        for pixels, digit in zip(originals(images, lowest, highest), classes, strict=True)
    )
    assert everything == Counter(
        (*map(int, pixels), int(digit)) for pixels, digit in zip(data.data, data.target, strict=True)
    )
    assert max(everything.values()) == 1


def test_every_class_has_its_share_in_the_test_part(parts):
    train, test = (torch.bincount(classes, minlength=10) for _, classes in parts)
    assert len(train) == len(test) == 10
    assert (test - 0.2 * (train + test)).abs().max() < 1


def test_they_are_normalised_on_the_training_part_only(parts):
    train, test = (images[:, 0] for images, _ in parts)
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std().item() == pytest.approx(1, abs=1e-5)
    assert abs(test.mean().item()) > 1e-4


def test_they_are_the_same_every_time_whatever_the_seeds(parts):
    torch.manual_seed(123)
    again = [cast(TensorDataset, loader.dataset).tensors for loader in loaders(image_size=8)]
    for (images, classes), (same_images, same_classes) in zip(parts, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(classes, same_classes)


def test_images_are_enlarged():
    train, test = loaders(batch_size=5, image_size=12)
    images, classes = next(iter(train))
    assert images.shape == (5, 3, 12, 12)
    assert classes.shape == (5,)
    assert next(iter(test))[0].shape[1:] == (3, 12, 12)


def test_only_the_training_part_is_shuffled():
    train, test = loaders(batch_size=360, image_size=8)
    first, second = (next(iter(train))[1] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(next(iter(test))[1], cast(TensorDataset, test.dataset).tensors[1])


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": -3}, {"image_size": 7}, {"image_size": 0}])
def test_an_argument_below_its_minimum_is_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"{name} must be an int >= \d.*, got {value}$"):
        digits_dataloaders(**arguments)


def test_their_metadata():
    data = digits_dataloaders(image_size=8)
    assert data.class_names == tuple("0123456789")
    (train, _), whole = cast(TensorDataset, data.train_dataloader.dataset).tensors, load_digits().images
    scaled = (train * data.std[0] + data.mean[0]) * 16
    assert scaled.min().item() == pytest.approx(0, abs=1e-4)
    assert scaled.max().item() == pytest.approx(whole.max(), abs=1e-4)
