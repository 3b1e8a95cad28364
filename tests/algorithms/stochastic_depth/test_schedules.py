"""Schedules of the drop rates over time."""

import math
from typing import Any

import pytest

from etude import State, Time, Timestamp
from etude.algorithms.stochastic_depth.rates import rates_over_depth
from etude.algorithms.stochastic_depth.schedules import (
    ProgressiveLayerDrop,
    StartLate,
    StopEarly,
    Warmup,
    as_schedules,
)
from helpers.networks import vectors


def state_at(batch: int, max_duration: str, batches_per_epoch: int = 6) -> State:
    """A state after `batch` batches of 4 samples."""
    epoch, batch_in_epoch = divmod(batch, batches_per_epoch)
    timestamp = Timestamp(epoch, batch, 4 * batch, batch_in_epoch, 4 * batch_in_epoch)
    dataloader = vectors(4 * batches_per_epoch, 4)
    duration = Time.from_timestring(max_duration)
    return State(model=None, max_duration=duration, train_dataloader=dataloader, timestamp=timestamp)


@pytest.mark.parametrize("max_duration", ["10ep", "60ba", "240sp"])
@pytest.mark.parametrize(
    ("warmup", "end"), [("0.2dur", 12), (0.2, 12), ("3ep", 18), ("50ba", 50), ("48sp", 12), ("1ba", 1), ("1.0dur", 60)]
)
def test_warmup_is_linear_per_batch_and_exact_at_its_end(warmup: str | float, end: int, max_duration: str) -> None:
    factor = Warmup(warmup)
    factors = [factor(state_at(batch, max_duration)) for batch in range(61)]
    assert factors[0] == 0
    assert factors[:end] == pytest.approx([batch / end for batch in range(end)])
    assert factors[end:] == [1.0] * (61 - end)


@pytest.mark.parametrize("batches_per_epoch", [3, 7, 10, 45])
@pytest.mark.parametrize("percent", [10, 20, 30, 70, 90])
def test_no_rounding_delays_the_end_of_a_fractional_warmup(batches_per_epoch: int, percent: int) -> None:
    """The first batch at or after the fraction has the full rate, whatever the numbers."""
    total = 3 * batches_per_epoch
    end = -(-percent * total // 100)
    factor = Warmup(f"{percent / 100}dur")
    assert factor(state_at(end, "3ep", batches_per_epoch)) == 1.0
    assert factor(state_at(end - 1, "3ep", batches_per_epoch)) < 1.0


def test_no_warmup_means_the_full_rate_from_the_first_batch() -> None:
    assert Warmup(0)(state_at(0, "1ep")) == 1.0


@pytest.mark.parametrize(
    ("warmup", "error", "message"),
    [
        (-0.1, ValueError, "drop_warmup must not be negative, got -0.1dur"),
        ("-2ep", ValueError, "drop_warmup must not be negative, got -2ep"),
        (1.5, ValueError, "drop_warmup must not be longer than the training, got 1.5dur"),
        ("3weeks", ValueError, "drop_warmup: the unit of a time must be one of .* got 'weeks'"),
        ("soon", ValueError, "drop_warmup: a time string must be like .* got 'soon'"),
        ("0.5ep", TypeError, 'drop_warmup: a time in "ep" must be an int, got 0.5'),
        (float("nan"), ValueError, "must be finite, got nan"),
        (None, TypeError, "drop_warmup must be a Time or a time string .* got None"),
        (True, TypeError, "drop_warmup must be a Time or a time string .* got True"),
    ],
)
def test_bad_warmup_is_refused(warmup: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Warmup(warmup)


@pytest.mark.parametrize("max_duration", ["2ep", "12ba", "48sp"])
@pytest.mark.parametrize("warmup", ["3ep", "13ba", "49sp"])
def test_warmup_longer_than_the_training_is_refused(warmup: str, max_duration: str) -> None:
    with pytest.raises(ValueError, match=f'longer than max_duration="{max_duration}", got "{warmup}"'):
        Warmup(warmup).check(state_at(0, max_duration))


@pytest.mark.parametrize("max_duration", ["2ep", "12ba", "48sp"])
@pytest.mark.parametrize("warmup", ["2ep", "12ba", "48sp", "1.0dur"])
def test_warmup_as_long_as_the_training_is_accepted(warmup: str, max_duration: str) -> None:
    Warmup(warmup).check(state_at(0, max_duration))


def test_warmup_in_epochs_needs_a_dataloader_with_a_length() -> None:
    state = State(model=None, max_duration=Time(2, "ep"), train_dataloader=iter([]))
    with pytest.raises(ValueError, match='"1ep" needs a train_dataloader with a length'):
        Warmup("1ep").check(state)


def factors(schedule: Any, max_duration: str = "10ep") -> list[float]:
    schedule.check(state_at(0, max_duration))
    return [schedule(state_at(batch, max_duration)) for batch in range(61)]


@pytest.mark.parametrize("max_duration", ["10ep", "60ba", "240sp"])
@pytest.mark.parametrize(("moment", "batch"), [("0.5dur", 30), (0.25, 15), ("2ep", 12), ("7ba", 7), ("40sp", 10)])
def test_starting_late_and_stopping_early_are_steps(moment: str | float, batch: int, max_duration: str) -> None:
    assert factors(StartLate(moment), max_duration) == [0.0] * batch + [1.0] * (61 - batch)
    assert factors(StopEarly(moment), max_duration) == [1.0] * batch + [0.0] * (61 - batch)


def test_starting_late_at_the_start_is_on_from_the_start() -> None:
    assert factors(StartLate(0)) == [1.0] * 61


def test_progressive_layer_drop_is_the_papers_theta() -> None:
    """Zhang and He 2020: the kept share of layer l of L is 1 - l/L * (1 - theta(t))."""
    theta_bar, gamma, num_layers = 0.5, 0.05, 12
    linear = rates_over_depth(1 - theta_bar, "linear", num_layers)
    for batch, factor in enumerate(factors(ProgressiveLayerDrop(gamma))):
        theta = (1 - theta_bar) * math.exp(-gamma * batch) + theta_bar
        kept = [1 - layer / num_layers * (1 - theta) for layer in range(1, num_layers + 1)]
        assert [1 - factor * rate for rate in linear] == pytest.approx(kept)


def test_a_function_of_the_elapsed_fraction_is_a_schedule() -> None:
    (schedule,) = as_schedules(lambda fraction: 1 - fraction)
    assert factors(schedule) == pytest.approx([1 - batch / 60 for batch in range(61)])


def test_every_schedule_says_what_it_is() -> None:
    def halfway(fraction: float) -> float:
        return 0.5

    schedules = [Warmup(0.2), StartLate("1ep"), StopEarly("30ba"), ProgressiveLayerDrop(0.001), *as_schedules(halfway)]
    text = repr(schedules)
    assert all(part in text for part in ["Warmup(", "StartLate(", "StopEarly(", "gamma=0.001", "halfway"])


def test_schedules_are_equal_if_their_settings_are() -> None:
    assert Warmup(0.2) == Warmup("0.2dur") != Warmup("0.3dur")
    assert StartLate("1ep") != StopEarly("1ep")


@pytest.mark.parametrize("nonsense", [1.5, -0.1, float("nan"), "half", None, True])
def test_a_function_that_returns_nonsense_is_refused_before_training(nonsense: Any) -> None:
    (schedule,) = as_schedules(lambda fraction: nonsense if fraction == 0.5 else 1.0)
    with pytest.raises(ValueError, match=r"drop_schedule must return a number in \[0, 1\], got .* at 0.5"):
        schedule.check(state_at(0, "10ep"))


@pytest.mark.parametrize("schedule", [0.5, "0.2dur", [Warmup(0.1), 3]])
def test_invalid_schedules_are_refused(schedule: object) -> None:
    with pytest.raises(TypeError, match=r"drop_schedule must be Warmup, StartLate, StopEarly, .* got"):
        as_schedules(schedule)


@pytest.mark.parametrize("gamma", [0, -1, float("nan"), float("inf"), "fast", True])
def test_a_bad_gamma_is_refused(gamma: object) -> None:
    with pytest.raises((TypeError, ValueError), match="gamma must be a finite number > 0, got"):
        ProgressiveLayerDrop(gamma)


@pytest.mark.parametrize("span", ["5min", "0.5sec", "0sec", Time(3, "min")])
@pytest.mark.parametrize(("schedule", "name"), [(Warmup, "drop_warmup"), (StartLate, "start"), (StopEarly, "stop")])
def test_wall_clock_time_is_refused_at_construction(schedule: type, name: str, span: str | Time) -> None:
    with pytest.raises(
        ValueError, match=f'^{name} must be in .*"dur".* do not depend on wall-clock time, got "{span}"'
    ):
        schedule(span)


def test_moments_outside_the_training_are_refused() -> None:
    with pytest.raises(ValueError, match="stop must be above 0 for stochastic depth to have an effect"):
        StopEarly(0)
    with pytest.raises(ValueError, match="start must not be negative, got -1ep"):
        StartLate("-1ep")
    with pytest.raises(ValueError, match='start must not be longer than max_duration="10ep", got "11ep"'):
        StartLate("11ep").check(state_at(0, "10ep"))
    with pytest.raises(ValueError, match='stop must not be longer than max_duration="10ep", got "61ba"'):
        StopEarly("61ba").check(state_at(0, "10ep"))
