"""NaN, out of memory and signals on one of two ranks."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from etude import Algorithm, Callback, Event
from etude.algorithms import StochasticDepth
from etude.trainer import TrainingInterrupted, distributed
from helpers.networks import images
from helpers.parallel_training import (
    OnOneRank,
    assert_same_on_all_ranks,
    make_model,
    parameters,
    train,
)
from helpers.ranks import on_ranks
from helpers.resumable import differences, make_trainer, result_of


def make_nan(state: Any) -> None:
    state.loss = state.loss * float("nan")


@on_ranks(2)
def test_a_nan_on_one_rank_stops_all_before_the_update() -> None:
    kept: list[Any] = []

    class Keep(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event is Event.BATCH_START and state.timestamp.batch == 3

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            kept.append(parameters(state.model))

    model = make_model()
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        train(model, images(), "8ba", Keep(), OnOneRank(Event.AFTER_LOSS, 3, make_nan))
    assert len(kept) == 1
    assert differences(kept[0], parameters(model)) == []


@on_ranks(2)
def test_a_nan_on_one_rank_is_left_out_by_all() -> None:
    model = make_model()
    trainer = train(model, images(), "8ba", OnOneRank(Event.AFTER_LOSS, 3, make_nan), max_nonfinite_steps=1)
    assert trainer.state.timestamp.batch == 8
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert_same_on_all_ranks(model)


@on_ranks(2)
def test_out_of_memory_on_one_rank_halves_the_microbatches_of_all() -> None:
    def fail(state: Any) -> None:
        if state.device_train_microbatch_size is None:
            raise torch.OutOfMemoryError("pretended")

    data = images(num_samples=16, batch_size=8)
    model = make_model()
    trainer = train(
        model,
        data,
        "4ba",
        StochasticDepth(drop_rate=0.5),
        OnOneRank(Event.AFTER_FORWARD, 0, fail),
        device_train_microbatch_size="auto",
    )
    assert trainer.state.device_train_microbatch_size == 2
    expected = make_model()
    train(expected, data, "4ba", StochasticDepth(drop_rate=0.5), device_train_microbatch_size=2)
    assert differences(expected.state_dict(), model.state_dict()) == []
    assert_same_on_all_ranks(model)


class StopOneRank(Callback):
    """Sends rank 1 a SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_forward(self, state: Any, logger: Any) -> None:
        if state.rank == 1 and state.timestamp.batch == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@on_ranks(2)
def test_sigterm_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    expected = make_trainer()
    expected.fit()
    folder = tmp_path / "sigterm"
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(save_folder=folder, callbacks=StopOneRank(step=3))
    with pytest.raises(TrainingInterrupted) as stop:
        trainer.fit()
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.state.timestamp.batch == 4
    assert distributed.from_rank_zero(sorted(path.name for path in folder.iterdir())) == [
        "ep0-ba0.pt",
        "ep0-ba4.pt",
        "latest",
    ]
    resumed = make_trainer(save_folder=folder, autoresume=True)
    assert resumed.state.timestamp.batch == 4
    resumed.fit()
    assert differences(result_of(expected), result_of(resumed)) == []
