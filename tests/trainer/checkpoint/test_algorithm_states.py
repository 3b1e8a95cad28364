"""States of algorithms in checkpoints: shared, per rank, and sharded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from etude import Callback, Trainer
from etude.trainer import CheckpointSaver
from etude.trainer.checkpoint.file import read_checkpoint
from helpers.networks import images
from helpers.parallel_training import make_model, refused, train
from helpers.probes import AverageWeights, CountRows
from helpers.ranks import on_ranks, run_on_ranks
from helpers.resumable import differences


def start(folder: Path, *algorithms: Any, duration: str = "4ba", callbacks: Any = (), **settings: Any) -> Trainer:
    return train(
        make_model(),
        images(num_samples=20, batch_size=4),
        duration,
        *algorithms,
        callbacks=[CheckpointSaver(folder, "2ba", num_to_keep=-1), *callbacks],
        **settings,
    )


def resume(path: Path, *algorithms: Any, **settings: Any) -> Trainer:
    return train(make_model(), images(num_samples=20, batch_size=4), "4ba", *algorithms, load_path=path, **settings)


def full(tensors: Any) -> dict[str, Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


@on_ranks(2)
def test_states_that_differ_between_ranks_are_saved_per_rank_and_others_once(tmp_path: Path) -> None:
    count, average = CountRows(), AverageWeights()
    start(tmp_path, count, average)
    contents = read_checkpoint(tmp_path / "ep0-ba2.pt")
    assert [item["name"] for item in contents["algorithms"]] == ["CountRows", "AverageWeights"]
    assert contents["algorithms"][0]["state"] == {"num_steps": 2}
    assert list(contents["algorithms"][1]["state"]["averages"]) == [n for n, _ in make_model().named_parameters()]
    assert [rank["algorithms"] for rank in contents["ranks"]] == [
        [{"rows": torch.tensor(4.0)}, {}],
        [{"rows": torch.tensor(204.0)}, {}],
    ]
    resumed, average_resumed = CountRows(), AverageWeights()
    resume(tmp_path / "ep0-ba2.pt", resumed, average_resumed)
    assert resumed._rows == count._rows == 4 * (2 + 100 * dist.get_rank())
    assert resumed._num_steps == 4
    assert differences(average.state_dict(), average_resumed.state_dict()) == []


def save_with_two_ranks(folder: Path) -> None:
    start(folder, CountRows(), AverageWeights(), parallelism="fsdp")


@pytest.mark.xdist_group("ranks")
def test_one_process_takes_the_state_of_rank_0_and_whole_averages_from_shards(tmp_path: Path) -> None:
    run_on_ranks(2, save_with_two_ranks, folder=tmp_path)
    count, average = CountRows(), AverageWeights()
    trainer = resume(tmp_path / "ep0-ba4.pt", count, average)
    assert trainer.state.timestamp.batch == 4
    assert (count._num_steps, count._rows) == (4, 8.0)
    assert {name: t.shape for name, t in average._averages.items()} == {
        name: p.shape for name, p in trainer.state.model.named_parameters()
    }
    assert all(type(t) is Tensor for t in average._averages.values())


@on_ranks(2)
def test_averages_of_a_sharded_model_are_saved_and_loaded_in_shards(tmp_path: Path) -> None:
    average = AverageWeights()
    start(tmp_path / "sharded", average, parallelism="fsdp")
    expected = full(average._averages)
    contents = read_checkpoint(tmp_path / "sharded" / "ep0-ba2.pt")
    assert all(value[0] == "sharded tensor" for value in contents["algorithms"][0]["state"]["averages"].values())
    copies = AverageWeights()
    start(tmp_path / "copies", copies)
    assert differences(expected, copies._averages) == []
    for folder, parallelism in (("sharded", "fsdp"), ("sharded", "ddp"), ("copies", "fsdp"), ("copies", "ddp")):
        resumed = AverageWeights()  # it has no averages before it is loaded: they are sharded like the model
        trainer = resume(tmp_path / folder / "ep0-ba2.pt", resumed, parallelism=parallelism)
        parameters = dict(trainer.state.model.named_parameters())
        assert {type(t) for t in resumed._averages.values()} == {type(p.data) for p in parameters.values()}
        if parallelism == "fsdp":
            for name, parameter in parameters.items():
                assert resumed._averages[name].placements == parameter.placements  # type: ignore[attr-defined]
        assert differences(expected, full(resumed._averages)) == [], (folder, parallelism)


@on_ranks(2)
def test_a_state_that_should_be_the_same_on_all_ranks_and_is_not_is_refused(tmp_path: Path) -> None:
    class Wrong(CountRows):
        def state_dict(self) -> dict[str, Any]:
            return {"num_steps": self._num_steps, "rows": self._rows}

    with refused("state_dict of Wrong must be the same on all ranks, rank 1 differs from rank 0"):
        start(tmp_path, Wrong())


class AveragesInCallback(Callback):
    def __init__(self) -> None:
        self.average = AverageWeights()

    def batch_end(self, state: Any, logger: Any) -> None:
        from etude import Event

        self.average.apply(Event.BATCH_END, state, logger)

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)


@on_ranks(2)
def test_callbacks_may_keep_sharded_tensors_and_may_be_added_or_removed(tmp_path: Path) -> None:
    callback = AveragesInCallback()
    start(tmp_path, callbacks=[callback], parallelism="fsdp")
    resumed = AveragesInCallback()
    resume(tmp_path / "ep0-ba2.pt", callbacks=[resumed], parallelism="fsdp")
    assert differences(full(callback.average._averages), full(resumed.average._averages)) == []
    assert resume(tmp_path / "ep0-ba2.pt", parallelism="fsdp").state.timestamp.batch == 4


def test_an_unknown_state_is_refused() -> None:
    from helpers.probes import ChangeBatch

    with pytest.raises(ValueError, match=r"ChangeBatch keeps no state, got \['x'\]"):
        ChangeBatch().load_state_dict({"x": 1})
    with pytest.raises(ValueError, match=r"ChangeBatch keeps no state per rank, got \['x'\]"):
        ChangeBatch().load_rank_state_dict({"x": 1})
    ChangeBatch().load_rank_state_dict(ChangeBatch().rank_state_dict())
