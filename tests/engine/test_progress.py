"""The progress of a run in checkpoints."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.engine import Timestamp
from etude.engine.progress import Progress

counts = st.integers(0, 2**40)


@given(batch=counts, epochs=st.integers(0, 5), in_epoch=counts, evaluated=st.integers(-1, 9), size=st.none() | counts)
def test_states_are_restored(batch: int, epochs: int, in_epoch: int, evaluated: int, size: int | None) -> None:
    batch += 9 + in_epoch
    progress = Progress(
        timestamp=Timestamp(epochs, batch, 4 * batch, in_epoch, 4 * in_epoch),
        eval_metrics={"loss/eval/total": 0.1 + batch},
        evaluated_at=evaluated,
        num_nonfinite_steps=min(batch, 3),
        device_train_microbatch_size=None if size is None else size + 1,
    )
    other = Progress()
    other.load_state_dict(progress.state_dict())
    assert other == progress


def test_every_field_is_kept() -> None:
    assert list(Progress().state_dict()) == [each.name for each in fields(Progress)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("timestamp", "batch"), -1),
        (("timestamp", "batch"), 2.0),
        (("timestamp", "epoch"), 6),
        (("timestamp", "batch_in_epoch"), 6),
        (("timestamp", "sample_in_epoch"), 21),
        (("evaluated_at",), 6),
        (("num_nonfinite_steps",), True),
        (("device_train_microbatch_size",), 0),
    ],
)
def test_an_impossible_progress_is_refused_and_changes_nothing(path: tuple[str, ...], value: Any) -> None:
    saved = Progress(timestamp=Timestamp(1, 5, 20, 2, 8)).state_dict()
    parent = saved["timestamp"] if len(path) == 2 else saved
    parent[path[-1]] = value
    progress = Progress()
    with pytest.raises((TypeError, ValueError), match=f"{path[-1]} must be an int"):
        progress.load_state_dict(saved)
    assert progress == Progress()
