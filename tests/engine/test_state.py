"""The state of a run."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from etude.engine import State, Time, Timestamp
from helpers.networks import vectors

ROWS = 4
LENGTHS_AND_EPOCHS = [(1, 1), (1, 7), (3, 3), (7, 3), (10, 3), (13, 11), (49, 2)]


def state_of(batches_per_epoch: int | None, max_duration: Time | None) -> State:
    batches = iter(()) if batches_per_epoch is None else [None] * batches_per_epoch
    return State(model=nn.Identity(), max_duration=max_duration, train_dataloader=batches)


def walk(batches_per_epoch: int, num_epochs: int) -> Iterator[tuple[int, Timestamp]]:
    """Number of finished batches and timestamp at each moment, just before and after an epoch's end, too."""
    timestamp = Timestamp()
    yield 0, timestamp
    for _ in range(num_epochs):
        for _ in range(batches_per_epoch):
            timestamp = timestamp.to_next_batch(ROWS)
            yield timestamp.batch, timestamp
        timestamp = timestamp.to_next_epoch()
        yield timestamp.batch, timestamp


def whole(unit: str, batches_per_epoch: int, num_epochs: int) -> Time:
    """The same training time in epochs, batches or samples."""
    num_batches = batches_per_epoch * num_epochs
    return Time({"ep": num_epochs, "ba": num_batches, "sp": num_batches * ROWS}[unit], unit)


class UnsizedRows(IterableDataset):
    def __iter__(self):
        yield from torch.zeros(8, 3)


@pytest.mark.parametrize("unit", ["ep", "ba", "sp"])
@pytest.mark.parametrize(("batches_per_epoch", "num_epochs"), LENGTHS_AND_EPOCHS)
class TestProgress:
    def test_of_the_whole_training_is_the_finished_share_of_the_batches(self, unit, batches_per_epoch, num_epochs):
        state = state_of(batches_per_epoch, None)
        for done, state.timestamp in walk(batches_per_epoch, num_epochs):
            share = done / (batches_per_epoch * num_epochs)
            assert state.progress(whole(unit, batches_per_epoch, num_epochs)) == share
        assert share == 1.0

    def test_of_a_shorter_span_is_linear_and_exactly_one_at_its_end(self, unit, batches_per_epoch, num_epochs):
        state = state_of(batches_per_epoch, None)
        for epochs in range(1, num_epochs + 1):
            span, length = whole(unit, batches_per_epoch, epochs), batches_per_epoch * epochs
            seen = {done: state.progress(span) for done, state.timestamp in walk(batches_per_epoch, num_epochs)}
            assert seen[0] == 0.0
            assert seen[length] == 1.0
            assert seen == {done: done / length for done in range(batches_per_epoch * num_epochs + 1)}

    def test_of_a_fraction_is_exactly_one_at_its_batch(self, unit, batches_per_epoch, num_epochs):
        state = state_of(batches_per_epoch, whole(unit, batches_per_epoch, num_epochs))
        num_batches = batches_per_epoch * num_epochs
        for length in range(1, num_batches + 1):
            span = Time(length / num_batches, "dur")
            seen = {done: state.progress(span) for done, state.timestamp in walk(batches_per_epoch, num_epochs)}
            assert seen[0] == 0.0
            assert seen[length] == 1.0
            assert seen == pytest.approx({done: done / length for done in range(num_batches + 1)}, rel=1e-14)

    def test_elapsed_duration_goes_from_zero_to_one_with_every_batch(self, unit, batches_per_epoch, num_epochs):
        state = state_of(batches_per_epoch, whole(unit, batches_per_epoch, num_epochs))
        for done, state.timestamp in walk(batches_per_epoch, num_epochs):
            share = done / (batches_per_epoch * num_epochs)
            assert state.get_elapsed_duration() == Time(share, "dur")
        assert state.get_elapsed_duration() == Time(1.0, "dur")

    def test_training_is_finished_at_the_end_and_not_before(self, unit, batches_per_epoch, num_epochs):
        state = state_of(batches_per_epoch, whole(unit, batches_per_epoch, num_epochs))
        answers = []
        for _, state.timestamp in walk(batches_per_epoch, num_epochs):
            answers.append(state.is_finished)
        # the last two moments are before and after the end of the last epoch
        assert answers == [False] * (len(answers) - 2) + [unit != "ep", True]


@pytest.mark.parametrize("unit", ["ep", "ba", "sp"])
@pytest.mark.parametrize("tenths", range(1, 10))
def test_progress_of_tenths_of_the_training_ends_exactly(tenths, unit):
    """The fractions that people write, ``"0.3dur"``: 10 batches in 3 epochs."""
    state = state_of(10, whole(unit, 10, 3))
    span = Time.from_timestring(f"0.{tenths}dur")
    seen = {done: state.progress(span) for done, state.timestamp in walk(10, 3)}
    assert max(value for done, value in seen.items() if done < 3 * tenths) < 1.0
    assert seen[3 * tenths] == 1.0
    assert min(value for done, value in seen.items() if done > 3 * tenths) > 1.0


class TestProgressErrors:
    def test_epochs_need_a_length(self):
        with pytest.raises(ValueError, match='"2ep" needs a train_dataloader with a length, this one has none'):
            state_of(None, None).progress(Time(2, "ep"))

    def test_epochs_need_a_dataloader(self):
        state = State(model=nn.Identity())
        with pytest.raises(ValueError, match='"2ep" needs a train_dataloader with a length'):
            state.progress(Time(2, "ep"))

    def test_a_fraction_needs_a_max_duration(self):
        with pytest.raises(ValueError, match=r'"0\.5dur" needs a max_duration, got None'):
            state_of(10, None).progress(Time(0.5, "dur"))

    def test_elapsed_duration_needs_a_max_duration(self):
        with pytest.raises(ValueError, match="needs a max_duration, got None"):
            state_of(10, None).get_elapsed_duration()

    def test_a_fraction_of_epochs_needs_a_length(self):
        with pytest.raises(ValueError, match="needs a train_dataloader with a length"):
            state_of(None, Time(3, "ep")).progress(Time(0.5, "dur"))

    @pytest.mark.parametrize("unit", ["ba", "sp"])
    def test_batches_and_samples_need_neither(self, unit):
        state = state_of(None, None)
        state.timestamp = Timestamp().to_next_batch(1)
        assert state.progress(Time(2, unit)) == 0.5


@pytest.mark.parametrize("text", ["5min", "0.5sec", "0sec"])
class TestClock:
    """What is a function of the timestamp cannot depend on a clock."""

    def test_wall_clock_time_has_no_progress(self, text: str) -> None:
        with pytest.raises(ValueError, match=f'span must be in .*"dur".*wall-clock time, got "{text}"'):
            state_of(10, Time(3, "ep")).progress(Time.from_timestring(text))

    def test_wall_clock_time_does_not_convert_to_epochs(self, text: str) -> None:
        with pytest.raises(ValueError, match=f'time must be in .*"dur".*wall-clock time, got "{text}"'):
            state_of(10, Time(3, "ep")).in_epochs(Time.from_timestring(text))


class TestBatchesPerEpoch:
    def test_is_the_length_of_the_dataloader(self):
        assert State(model=nn.Identity(), train_dataloader=vectors(24, 4)).batches_per_epoch == 6

    def test_is_unknown_for_a_stream(self):
        state = State(model=nn.Identity(), train_dataloader=DataLoader(UnsizedRows(), 4))
        assert state.batches_per_epoch is None

    def test_is_unknown_without_data(self):
        assert State(model=nn.Identity()).batches_per_epoch is None


class TestInEpochs:
    """22 samples in batches of 4: 6 batches, the last one smaller."""

    def state(self, **arguments) -> State:
        return State(model=nn.Identity(), train_dataloader=vectors(22, 4), **arguments)

    @pytest.mark.parametrize(("time", "epochs"), [("3ep", 3), ("9ba", 1.5), ("33sp", 1.5), ("22sp", 1), ("6ba", 1)])
    def test_converts_by_what_one_epoch_reads(self, time, epochs):
        assert self.state().in_epochs(Time.from_timestring(time)) == epochs

    @pytest.mark.parametrize("max_duration", ["4ep", "24ba", "88sp"])
    def test_a_fraction_is_of_the_max_duration(self, max_duration):
        state = self.state(max_duration=Time.from_timestring(max_duration))
        assert state.in_epochs(Time(0.5, "dur")) == 2

    def test_a_fraction_without_max_duration_is_unknown(self):
        assert self.state().in_epochs(Time(0.5, "dur")) is None

    def test_samples_of_a_dropped_last_batch_are_not_read(self):
        loader = DataLoader(TensorDataset(torch.zeros(22, 1)), 4, drop_last=True)
        state = State(model=nn.Identity(), train_dataloader=loader)
        assert state.in_epochs(Time(20, "sp")) == 1

    def test_a_batch_is_that_of_all_ranks(self):
        assert self.state(world_size=2).in_epochs(Time(44, "sp")) == self.state().in_epochs(Time(44, "sp"))

    @pytest.mark.parametrize("unit", ["ba", "sp"])
    def test_is_unknown_if_the_dataloader_has_no_length(self, unit):
        state = State(model=nn.Identity(), train_dataloader=DataLoader(UnsizedRows(), 4))
        assert state.in_epochs(Time(4, unit)) is None
        assert state.in_epochs(Time(4, "ep")) == 4

    def test_the_number_of_samples_is_unknown_without_a_batch_size(self):
        assert state_of(6, None).in_epochs(Time(24, "sp")) is None
