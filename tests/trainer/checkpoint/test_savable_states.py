"""States that cannot be saved raise soon after the change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etude import Algorithm, Callback, Event, Trainer
from helpers.networks import linear_model, vectors
from helpers.ranks import on_ranks


class Mean(Algorithm):
    """Keeps a number, which numpy makes one of its own at an event."""

    def __init__(self, event: Event, step: int = 1, of_rank: bool = False) -> None:
        self._event, self._step, self._of_rank, self._value = event, step, of_rank, 0.0

    def match(self, event: Event, state: Any) -> bool:
        return event is self._event and state.timestamp.batch >= self._step

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        is_last_rank = state.rank == state.world_size - 1
        self._value = np.float64(0.5) if is_last_rank else 0.5

    def state_dict(self) -> dict[str, Any]:
        return {} if self._of_rank else {"value": self._value}

    def rank_state_dict(self) -> dict[str, Any]:
        return {"value": self._value} if self._of_rank else {}


class MeanCallback(Callback):
    def __init__(self) -> None:
        self.value = 0.0

    def batch_end(self, state: Any, logger: Any) -> None:
        self.value = np.float64(0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}


def make_trainer(folder: Path, *algorithms: Algorithm, **settings: Any) -> Trainer:
    return Trainer(
        linear_model(),
        vectors(),
        vectors(8),
        "100ep",
        algorithms,
        save_folder=folder,
        save_interval="1dur",
        progress_bar=False,
        **settings,
    )


@pytest.mark.parametrize(
    ("event", "step", "found_at"),
    [(Event.BATCH_END, 1, 1), (Event.BATCH_END, 20, 24), (Event.EPOCH_END, 1, 6), (Event.EVAL_END, 1, 6)],
)
@pytest.mark.parametrize("of_rank", [False, True])
def test_it_is_found_long_before_the_next_save(
    event: Event, step: int, found_at: int, of_rank: bool, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, Mean(event, step, of_rank))
    with pytest.raises(TypeError, match=r"the state of Mean\.value must be plain values.*, got a numpy\.float64"):
        trainer.fit()
    assert trainer.state.timestamp.batch == found_at


def test_the_state_of_a_callback_is_checked_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=MeanCallback())
    with pytest.raises(TypeError, match=r"the state of MeanCallback\.value must be plain values"):
        trainer.fit()
    assert trainer.state.timestamp.batch == 1


@on_ranks(2)
def test_on_two_ranks_the_state_of_one_ends_both(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Mean(Event.BATCH_END, of_rank=True))
    with pytest.raises((TypeError, RuntimeError), match=r"the state of Mean\.value must be plain values"):
        trainer.fit()
    assert trainer.state.timestamp.batch == 1
