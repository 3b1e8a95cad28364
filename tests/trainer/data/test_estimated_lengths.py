"""Dataloaders whose length is only an estimate."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from etude import Callback, Event, Trainer
from etude.trainer import CheckpointSaver
from helpers.networks import LinearModel

NUM_BATCHES = 5  # in every epoch


class Estimated(Sampler[list[int]]):
    """Five batches of different sizes, as of at most so many tokens, with an estimate of their number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(15).tolist()
        for number in range(NUM_BATCHES):
            yield order[number * (number + 1) // 2 : (number + 1) * (number + 2) // 2]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Ten samples and an estimate of their number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((torch.randn(8), torch.randint(3, ())) for _ in range(2 * NUM_BATCHES))


def batches(length: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    dataset = TensorDataset(torch.randn(15, 8, generator=generator), torch.arange(15) % 3)
    return DataLoader(dataset, batch_sampler=Estimated(length))


def stream(length: int) -> DataLoader[Any]:
    return DataLoader(Stream(2 * length), 2)


class Ends(Callback):
    """Notes after how many batches an epoch ended."""

    def __init__(self) -> None:
        self.at: list[int] = []

    def epoch_end(self, state: Any, logger: Any) -> None:
        self.at.append(int(state.timestamp.batch))


def fit(dataloader: DataLoader[Any], max_duration: str, **settings: Any) -> tuple[dict[str, Tensor], list[int]]:
    """Train; the weights, and after how many batches the epochs ended."""
    torch.manual_seed(0)
    model, ends = LinearModel(), Ends()
    callbacks = [ends, *settings.pop("callbacks", ())]
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, dataloader, None, max_duration, optimizers=optimizer, callbacks=callbacks, device="cpu",
                      progress_bar=False, **settings)  # fmt: skip
    trainer.fit()
    trainer.close()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, ends.at


@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
@pytest.mark.parametrize("length", [3, 5, 9], ids=["too short", "exact", "too long"])
@pytest.mark.parametrize("make", [batches, stream])
class TestEstimates:
    def test_every_checkpoint_resumes_to_the_same_end(
        self, tmp_path: Path, make: Callable[[int], DataLoader[Any]], length: int
    ) -> None:
        saver = CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)
        expected, ends = fit(make(length), "2ep", callbacks=[saver])
        assert ends == [5, 10]
        checkpoints = sorted(tmp_path.glob("*.pt"))
        assert len(checkpoints) == 12
        for path in checkpoints:
            found, rest = fit(make(length), "2ep", load_path=path)
            assert all(torch.equal(found[name], expected[name]) for name in expected), path.name
            epoch = int(path.name[2])
            assert rest == ends[epoch:]

    @pytest.mark.parametrize("stop", [3, 4, 5, 8, 9, 10])
    def test_an_epoch_ends_with_its_batches(
        self, make: Callable[[int], DataLoader[Any]], length: int, stop: int
    ) -> None:
        _, ends = fit(make(length), f"{stop}ba")
        assert ends == [end for end in (5, 10) if end <= stop]

    @pytest.mark.parametrize("stop", [3, 5])
    def test_a_finished_run_continues_with_a_longer_duration(
        self, tmp_path: Path, make: Callable[[int], DataLoader[Any]], length: int, stop: int
    ) -> None:
        expected, _ = fit(make(length), "8ba")
        fit(make(length), f"{stop}ba", save_folder=tmp_path)
        found, _ = fit(make(length), "8ba", save_folder=tmp_path, autoresume=True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_progress_never_goes_back(self, make: Callable[[int], DataLoader[Any]], length: int) -> None:
        seen: list[float] = []

        class Watch(Callback):
            def batch_end(self, state: Any, logger: Any) -> None:
                seen.append(float(state.get_elapsed_duration()))

        fit(make(length), "2ep", callbacks=[Watch()])
        assert seen == sorted(seen)
        assert max(seen) <= 1


def test_the_end_of_an_epoch_is_left_to_do_after_a_kill_in_its_last_batch(tmp_path: Path) -> None:
    """The checkpoint of the last batch is taken before the epoch ends."""
    fit(batches(3), "1ep", callbacks=[CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)])
    for path, ends in ((tmp_path / "ep0-ba5.pt", [5]), (tmp_path / "ep0-ba4.pt", [5]), (tmp_path / "ep1-ba5.pt", [])):
        assert fit(batches(3), "1ep", load_path=path)[1] == ends


def test_events_of_an_epoch_are_those_of_an_undisturbed_one() -> None:
    names: list[str] = []

    class Watch(Callback):
        def run_event(self, event: Event, state: Any, logger: Any) -> None:
            names.append(event.value)

    fit(batches(3), "5ba", callbacks=[Watch()])
    assert names.count("batch_end") == 5
    assert names.count("epoch_end") == names.count("epoch_checkpoint") == 1
