"""Property tests of `Time` and `Timestamp`."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude import Time, Timestamp, TimeUnit

COUNTED = [TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE]
counts = st.integers(-(10**12), 10**12)
fractions = st.floats(-1e6, 1e6)
counted_units = st.sampled_from(COUNTED)


def times(unit: TimeUnit) -> st.SearchStrategy[Time]:
    return st.builds(Time, counts if unit in COUNTED else fractions, st.just(unit))


any_time = st.sampled_from(TimeUnit).flatmap(times)
two_times = st.sampled_from(TimeUnit).flatmap(lambda unit: st.tuples(times(unit), times(unit)))
two_counted_times = counted_units.flatmap(lambda unit: st.tuples(times(unit), times(unit)))


@given(any_time)
def test_the_time_string_is_read_as_the_same_time(time: Time) -> None:
    again = Time.from_timestring(time.to_timestring())
    assert (again, hash(again), type(again.value)) == (time, hash(time), type(time.value))
    assert time == time.to_timestring() == str(time)


@given(counts.map(abs), counted_units, st.sampled_from(["{}{}", " {}{} ", "{} {}", "{}.0{}", "+{}{}", "{:_}{}"]))
def test_every_way_to_write_a_count_is_read(value: int, unit: TimeUnit, form: str) -> None:
    assert Time.from_timestring(form.format(value, unit)) == Time(value, unit)


@given(two_counted_times)
def test_counts_add_subtract_and_compare_as_ints(pair: tuple[Time, Time]) -> None:
    one, other = pair
    assert (one + other).value == one.value + other.value
    assert (one - other) + other == one
    assert one - other == -(other - one)
    assert (one < other, one <= other, one == other) == (
        one.value < other.value,
        one.value <= other.value,
        one.value == other.value,
    )


@given(two_counted_times)
def test_quotient_and_remainder_give_back_the_time(pair: tuple[Time, Time]) -> None:
    time, step = pair
    if step:
        assert step * (time.value // step.value) + time % step == time
        assert time / step == Time(time.value / step.value, "dur")


@given(any_time, any_time)
def test_times_of_different_units_neither_combine_nor_compare(one: Time, other: Time) -> None:
    if one.unit is not other.unit:
        assert one != other
        for combine in (lambda: one + other, lambda: one - other, lambda: one < other, lambda: one / other):
            with pytest.raises(ValueError, match="times of different units cannot be combined"):
                combine()


@given(two_times, st.booleans())
def test_equal_times_have_equal_hashes(pair: tuple[Time, Time], are_equal: bool) -> None:
    one, other = pair
    other = Time(one.value, one.unit) if are_equal else other
    assert (one == other) == (one.value == other.value)
    if one == other:
        assert hash(one) == hash(other)


@given(counts.map(abs), counted_units, st.floats(0, 1))
def test_a_fraction_of_a_count_is_rounded_down(value: int, unit: TimeUnit, fraction: float) -> None:
    part = Time(value, unit) * Time(fraction, "dur")
    assert part.unit is unit
    assert part.value == math.floor(value * fraction)


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 5))
def test_a_timestamp_counts_every_batch_and_its_samples(rows: list[int], batches_per_epoch: int) -> None:
    timestamp = Timestamp()
    for number, samples in enumerate(rows, start=1):
        timestamp = timestamp.to_next_batch(samples)
        if number % batches_per_epoch == 0:
            timestamp = timestamp.to_next_epoch()
    in_epoch = rows[len(rows) - len(rows) % batches_per_epoch :]
    expected: dict[str, Any] = {
        "epoch": len(rows) // batches_per_epoch,
        "batch": len(rows),
        "sample": sum(rows),
        "batch_in_epoch": len(in_epoch),
        "sample_in_epoch": sum(in_epoch),
    }
    assert timestamp == Timestamp(**expected)
    assert timestamp.state_dict() == expected
