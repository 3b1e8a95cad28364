import math

import pytest
import torch

from etude.engine.epoch_loss import EpochLoss
from etude.engine.progress import Progress


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_it_is_the_mean_over_all_samples(count: int) -> None:
    losses, mean = torch.rand(count), EpochLoss()
    samples = [1 + number % 5 for number in range(count)]
    for loss, num_samples in zip(losses, samples, strict=True):
        mean.add(loss, num_samples)
    expected = sum(float(loss) * number for loss, number in zip(losses, samples, strict=True)) / sum(samples)
    assert mean.mean == pytest.approx(expected)
    mean.reset()
    assert mean.mean is None


def test_it_continues_from_its_sums() -> None:
    whole, first, second = EpochLoss(), EpochLoss(), EpochLoss()
    for number in range(6):
        whole.add(torch.tensor(float(number)), 2)
        (first if number < 3 else second).add(torch.tensor(float(number)), 2)
        if number == 2:
            second.sums = first.sums
    assert second.mean == whole.mean == 2.5


def test_losses_that_are_not_finite_do_not_count() -> None:
    mean = EpochLoss()
    for value in (1.0, math.nan, math.inf, 3.0):
        mean.add(torch.tensor(value), 1)
    assert mean.mean == 2.0
    assert mean.sums == (4.0, 2.0)


@pytest.mark.parametrize("sums", [[1.0, "2"], [math.nan, 1.0], [1.0, -1.0], [1, 2.0]])
def test_sums_of_a_checkpoint_that_cannot_be_are_refused(sums: list[object]) -> None:
    with pytest.raises(ValueError, match="epoch_loss must be a sum of losses and a number of samples"):
        Progress().load_state_dict({**Progress().state_dict(), "epoch_loss": sums})
