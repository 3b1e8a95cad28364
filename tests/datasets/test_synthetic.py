"""Synthetic images."""

from typing import Any

import pytest
import torch

from etude.datasets import synthetic_dataloaders


def test_there_are_as_many_images_and_classes_as_asked() -> None:
    data = synthetic_dataloaders(8, 16, num_classes=5, num_train=100, num_eval=20)
    batches = list(data.train_dataloader)
    assert [images.shape for images, _ in batches] == [(8, 3, 16, 16)] * 12
    assert set(torch.cat([targets for _, targets in batches]).tolist()) == set(range(5))
    assert sum(len(targets) for _, targets in data.eval_dataloader) == 20
    assert (data.num_classes, data.image_size) == (5, 16)


def test_the_seed_decides() -> None:
    def first(seed: int) -> torch.Tensor:
        return next(iter(synthetic_dataloaders(4, 8, num_train=8, num_eval=8, seed=seed).eval_dataloader))[0]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


@pytest.mark.parametrize("name", ["batch_size", "image_size", "num_classes", "num_train", "num_eval", "seed"])
def test_numbers_are_checked(name: str) -> None:
    settings: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=f"{name} must be an int >= "):
        synthetic_dataloaders(**settings)
