"""`Time`, `Count` and `Timestamp`."""

import copy
import dataclasses
import itertools
import json
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from etude.engine import Time, Timestamp, TimeUnit, as_time

COUNTED = [TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE]
CLOCK = [TimeUnit.SECOND, TimeUnit.MINUTE]
MIXED = list(itertools.permutations(TimeUnit, 2))
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge]


class TestParsing:
    @pytest.mark.parametrize("unit", TimeUnit)
    def test_a_number_and_a_unit_are_read(self, unit):
        assert Time.from_timestring(f"3{unit.value}") == Time(3, unit)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            (" 3 ep ", 3),
            ("+3ep", 3),
            ("-3ep", -3),
            ("1_000ba", 1000),
            ("0sp", 0),
            ("0.2dur", 0.2),
            (".5dur", 0.5),
            ("1.dur", 1.0),
            ("1e-3dur", 0.001),
            ("90sec", 90),
            ("1.5min", 1.5),
            ("1e3sec", 1000),
        ],
    )
    def test_ways_to_write_a_number(self, text, value):
        assert Time.from_timestring(text).value == value

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_an_int_is_parsed_as_a_float_only_for_durations(self, unit):
        value = Time.from_timestring(f"3{unit}").value
        assert type(value) is (float if unit is TimeUnit.DURATION else int)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "3",
            "ep",
            "ep3",
            "3 e p",
            "3ep5",
            "3ep 5ba",
            "--3ep",
            "1e3",
            "three ep",
            "3EP",
            "٣ep",
            "3ep\0",
            "0x3ep",
        ],
    )
    def test_invalid_time_strings_are_refused(self, text):
        examples = r'"3ep", "100ba", "6400sp", "0\.2dur", "90sec" or "5min"'
        with pytest.raises(ValueError, match=f"must be like {examples}, got") as caught:
            Time.from_timestring(text)
        assert repr(text) in str(caught.value)

    @pytest.mark.parametrize("text", ["3epochs", "3b", "3s", "3m", "3mins"])
    def test_an_unknown_unit_is_refused(self, text):
        with pytest.raises(ValueError, match=f'one of "ep", "ba", "sp", "dur", "sec", "min", got {text[1:]!r}'):
            Time.from_timestring(text)

    @pytest.mark.parametrize("unit", COUNTED)
    @pytest.mark.parametrize("number", ["1.5", "0.1", "1e-3", "1e400"])
    def test_a_fraction_of_a_counted_unit_is_refused(self, number: str, unit: TimeUnit) -> None:
        with pytest.raises(TypeError, match=f'a time in "{unit}" must be an int, got {float(number)}'):
            Time.from_timestring(f"{number}{unit}")

    @pytest.mark.parametrize("unit", COUNTED)
    @pytest.mark.parametrize(("number", "value"), [("2.0", 2), ("2.", 2), ("1e3", 1000), ("3e10", 3 * 10**10)])
    def test_an_integral_number_of_a_counted_unit_may_be_written_as_a_float(
        self, number: str, value: int, unit: TimeUnit
    ) -> None:
        time = Time.from_timestring(f"{number}{unit}")
        assert time.value == value
        assert type(time.value) is int

    @pytest.mark.parametrize("text", ["3ep", "100ba", "6400sp", "0.2dur", "90sec", "1.5min"])
    def test_a_time_converts_back_to_its_time_string(self, text: str) -> None:
        assert Time.from_timestring(text).to_timestring() == text

    def test_a_number_too_large_for_a_float_is_refused(self):
        with pytest.raises(ValueError, match="must be finite, got inf"):
            Time.from_timestring("1e999dur")

    @pytest.mark.parametrize(
        "time",
        [
            Time(3, "ep"),
            Time(-7, "ba"),
            Time(10**18, "sp"),
            Time(0.1 + 0.2, "dur"),
            Time(1e-9, "dur"),
            Time(1e22, "dur"),
            Time(5, "min"),
            Time(0.1, "sec"),
        ],
    )
    def test_the_text_of_a_time_reads_as_that_time(self, time):
        assert Time.from_timestring(str(time)) == time


class TestConstruction:
    @pytest.mark.parametrize("unit", TimeUnit)
    def test_a_unit_and_its_suffix_are_the_same(self, unit):
        assert Time(2, unit.value).unit is unit
        assert str(unit) == unit.value

    @pytest.mark.parametrize("unit", ["", "epoch", "EP", None, 3])
    def test_an_unknown_unit_is_refused(self, unit):
        known = '"ep", "ba", "sp", "dur", "sec", "min"'
        with pytest.raises(ValueError, match=f"unit of a time must be one of {known}, got {unit!r}"):
            Time(1, unit)

    def test_only_seconds_and_minutes_are_of_a_clock(self) -> None:
        assert [unit for unit in TimeUnit if unit.is_clock] == CLOCK

    @pytest.mark.parametrize("value", ["3", None, True, 1j])
    @pytest.mark.parametrize("unit", TimeUnit)
    def test_a_value_of_another_type_is_refused(self, value, unit):
        with pytest.raises(TypeError, match="value of a time must be a number, got") as caught:
            Time(value, unit)
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize("unit", COUNTED)
    @pytest.mark.parametrize("value", [0.5, 2.0])
    def test_a_float_of_a_counted_unit_is_refused(self, value, unit):
        with pytest.raises(TypeError, match=f'a time in "{unit}" must be an int, got {value}'):
            Time(value, unit)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite_are_refused(self, value):
        with pytest.raises(ValueError, match=f"value of a time must be finite, got {value}"):
            Time(value, "dur")

    @pytest.mark.parametrize("name", ["value", "unit"])
    def test_a_time_is_immutable(self, name):
        time = Time(3, "ep")
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(time, name, getattr(time, name))

    def test_each_unit_has_a_constructor_as_in_composer(self) -> None:
        assert Time.from_epoch(3) == Time(3, "ep")
        assert Time.from_batch(3) == Time(3, "ba")
        assert Time.from_sample(3) == Time(3, "sp")
        assert Time.from_duration(0.3) == Time(0.3, "dur")

    def test_from_input_takes_times_strings_and_numbers_with_a_unit(self) -> None:
        time = Time(5, "ep")
        assert Time.from_input(time) is time
        assert Time.from_input("5ep") == time
        assert Time.from_input(5, TimeUnit.EPOCH) == Time.from_input(5, "ep") == time
        assert Time.from_input("5ba", "ep") == Time(5, "ba")

    @pytest.mark.parametrize("value", [5, 0.5, None, ["5ep"]])
    def test_from_input_refuses_what_has_no_unit(self, value: Any) -> None:
        with pytest.raises(TypeError, match="must be a Time or a time string") as caught:
            Time.from_input(value)
        assert repr(value) in str(caught.value)


class TestComparison:
    @pytest.mark.parametrize("unit", TimeUnit)
    def test_times_of_one_unit_are_ordered_by_value(self, unit):
        small, large = Time(2, unit), Time(3, unit)
        assert small < large
        assert small <= large
        assert small <= Time(2, unit)
        assert large > small
        assert large >= small
        assert not small > large
        assert not large <= small
        assert not small < Time(2, unit)

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_equal_times_are_equal_with_equal_hashes(self, unit):
        assert Time(3, unit) == Time(3, unit.value)
        assert hash(Time(3, unit)) == hash(Time(3, unit.value))
        assert Time(3, unit) != Time(4, unit)

    def test_a_whole_and_a_float_duration_are_one_key(self):
        assert Time(1, "dur") == Time(1.0, "dur")
        assert len({Time(1, "dur"), Time(1.0, "dur")}) == 1

    def test_times_of_all_units_are_different_keys(self):
        assert len({Time(1, unit) for unit in TimeUnit}) == len(TimeUnit)

    @pytest.mark.parametrize(("unit", "other"), MIXED)
    def test_times_of_different_units_are_never_equal(self, unit, other):
        assert Time(3, unit) != Time(3, other)
        assert not Time(3, unit) == Time(3, other)  # noqa: SIM201  # __eq__ itself

    @pytest.mark.parametrize("compare", COMPARISONS)
    @pytest.mark.parametrize(("unit", "other"), MIXED)
    def test_times_of_different_units_have_no_order(self, unit, other, compare):
        with pytest.raises(ValueError, match=f'different units cannot be combined: "1{unit}" and "2{other}"'):
            compare(Time(1, unit), Time(2, other))

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_a_bare_number_is_read_in_the_same_unit(self, unit):
        time = Time(3, unit)
        assert time == 3
        assert time != 4
        assert 2 < time < 4
        assert 3 <= time <= 3
        assert not time > 3

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_a_string_is_read_as_a_time(self, unit):
        time = Time(3, unit)
        assert time == f"3{unit}"
        assert time != f"4{unit}"
        assert f"2{unit}" < time < f"4{unit}"

    def test_a_string_of_another_unit_is_a_time_of_another_unit(self):
        assert Time(3, "ep") != "3ba"
        with pytest.raises(ValueError, match='"3ep" and "4ba"'):
            assert Time(3, "ep") < "4ba"

    @pytest.mark.parametrize("other", [None, [3], Timestamp()])
    def test_a_time_is_unequal_to_other_types(self, other):
        assert Time(3, "ep") != other

    @pytest.mark.parametrize("compare", COMPARISONS)
    def test_a_time_cannot_be_ordered_with_other_types(self, compare):
        with pytest.raises(TypeError, match="not supported between"):
            compare(Time(3, "ep"), None)

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_only_zero_is_false(self, unit):
        assert not Time(0, unit)
        assert Time(1, unit)
        assert Time(-1, unit)


class TestArithmetic:
    @pytest.mark.parametrize("unit", TimeUnit)
    def test_times_of_one_unit_add_and_subtract(self, unit):
        assert Time(5, unit) + Time(3, unit) == Time(8, unit)
        assert Time(5, unit) - Time(3, unit) == Time(2, unit)
        assert -Time(5, unit) == Time(-5, unit)

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_bare_numbers_add_and_subtract_on_both_sides(self, unit):
        time = Time(5, unit)
        assert time + 3 == 3 + time == Time(8, unit)
        assert time - 3 == Time(2, unit)
        assert 3 - time == Time(-2, unit)

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_strings_add_and_subtract(self, unit):
        assert Time(5, unit) + f"3{unit}" == Time(8, unit)
        assert Time(5, unit) - f"3{unit}" == Time(2, unit)

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_the_remainder_of_times_of_one_unit(self, unit: TimeUnit) -> None:
        assert Time(7, unit) % Time(4, unit) == Time(7, unit) % 4 == Time(7, unit) % f"4{unit}" == Time(3, unit)
        assert 7 % Time(4, unit) == Time(3, unit)

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_a_time_times_a_fraction_of_the_duration_keeps_its_unit(self, unit: TimeUnit) -> None:
        assert Time(6, unit) * Time(0.5, "dur") == Time(0.5, "dur") * Time(6, unit) == Time(3, unit)

    @pytest.mark.parametrize("unit", [*COUNTED, *CLOCK])
    def test_a_time_does_not_multiply_by_a_time_of_its_unit(self, unit: TimeUnit) -> None:
        with pytest.raises(ValueError, match=f'multiplied by a number or a time in "dur", got "3{unit}"'):
            Time(2, unit) * Time(3, unit)

    def test_times_can_be_summed(self):
        times: Any = [Time(1, "ba"), Time(2, "ba"), Time(3, "ba")]
        assert sum(times) == Time(6, "ba")

    @pytest.mark.parametrize("combine", [operator.add, operator.sub, operator.truediv, operator.mod])
    @pytest.mark.parametrize(("unit", "other"), MIXED)
    def test_times_of_different_units_do_not_combine(self, unit, other, combine):
        with pytest.raises(ValueError, match=f'different units cannot be combined: "1{unit}" and "2{other}"'):
            combine(Time(1, unit), Time(2, other))

    @pytest.mark.parametrize("unit", COUNTED)
    def test_a_fraction_does_not_add_to_a_counted_unit(self, unit):
        with pytest.raises(TypeError, match=f'a time in "{unit}" must be an int, got 0.5'):
            Time(1, unit) + 0.5

    @pytest.mark.parametrize("unit", COUNTED)
    def test_counted_units_round_down_when_multiplied_or_divided(self, unit):
        time = Time(7, unit)
        assert time * 2 == 2 * time == Time(14, unit)
        assert time * 0.5 == time / 2 == Time(3, unit)
        assert type((time * 0.5).value) is type((time / 2).value) is int

    def test_durations_multiply_and_divide_as_fractions(self):
        assert Time(0.5, "dur") * 0.5 == Time(0.25, "dur")
        assert Time(0.5, "dur") / 2 == Time(0.25, "dur")

    @pytest.mark.parametrize("unit", CLOCK)
    def test_clock_times_multiply_divide_and_add_as_fractions(self, unit: TimeUnit) -> None:
        assert Time(3, unit) * 0.5 == 0.5 * Time(3, unit) == Time(3, unit) / 2 == Time(1.5, unit)
        assert Time(1, unit) + 0.5 == Time(1.5, unit)

    @pytest.mark.parametrize("unit", TimeUnit)
    def test_the_ratio_of_two_times_is_a_fraction_of_the_duration(self, unit):
        assert Time(1, unit) / Time(4, unit) == Time(0.25, "dur")
        assert Time(1, unit) / f"4{unit}" == Time(0.25, "dur")

    def test_a_time_converts_to_numbers(self):
        assert int(Time(3, "ep")) == 3
        assert float(Time(0.5, "dur")) == 0.5


class TestAsTime:
    def test_a_time_is_returned_as_it_is(self):
        time = Time(3, "ep")
        assert as_time(time) is time

    def test_a_string_is_read(self):
        assert as_time("3ep") == Time(3, "ep")

    @pytest.mark.parametrize("value", [3, 0.5, None, ["3ep"]])
    def test_anything_else_is_refused_by_name(self, value):
        with pytest.raises(TypeError, match="my_time must be a Time or a time string") as caught:
            as_time(value, "my_time")
        assert repr(value) in str(caught.value)

    def test_an_int_is_accepted_with_a_default_unit(self) -> None:
        assert as_time(3, "my_time", TimeUnit.EPOCH) == Time(3, "ep")
        with pytest.raises(TypeError, match='my_time must be a Time or a time string like "3ep" or a number of "ep"'):
            as_time(True, "my_time", TimeUnit.EPOCH)

    @pytest.mark.parametrize(("text", "error"), [("soon", ValueError), ("3xy", ValueError), ("1.5ep", TypeError)])
    def test_a_string_that_cannot_be_read_is_refused_by_name(self, text, error):
        with pytest.raises(error, match=r"^my_time: .* got "):
            as_time(text, "my_time")


class TestTimestamp:
    def test_it_starts_at_zero(self):
        assert set(Timestamp().state_dict().values()) == {0}

    def test_a_batch_moves_all_counters_but_the_epoch(self):
        before = Timestamp(epoch=2, batch=10, sample=40, batch_in_epoch=3, sample_in_epoch=12)
        after = Timestamp(epoch=2, batch=11, sample=45, batch_in_epoch=4, sample_in_epoch=17)
        assert before.to_next_batch(5) == after

    def test_the_end_of_an_epoch_resets_what_is_counted_in_it(self):
        before = Timestamp(epoch=2, batch=10, sample=40, batch_in_epoch=3, sample_in_epoch=12)
        assert before.to_next_epoch() == Timestamp(epoch=3, batch=10, sample=40)

    def test_moves_leave_the_original_alone(self):
        timestamp = Timestamp()
        timestamp.to_next_batch(4)
        timestamp.to_next_epoch()
        assert timestamp == Timestamp()
        with pytest.raises(dataclasses.FrozenInstanceError):
            timestamp.batch = 1  # type: ignore[assignment]

    @pytest.mark.parametrize(("unit", "value"), [("ep", 2), ("ba", 10), ("sp", 40)])
    def test_it_returns_the_elapsed_time_in_each_unit(self, unit, value):
        timestamp = Timestamp(epoch=2, batch=10, sample=40, batch_in_epoch=3, sample_in_epoch=12)
        assert timestamp.get(unit) == timestamp.get(TimeUnit(unit)) == Time(value, unit)

    def test_it_does_not_know_the_duration(self):
        with pytest.raises(ValueError, match=r'no "dur": use State\.get_elapsed_duration'):
            Timestamp().get("dur")

    @pytest.mark.parametrize("unit", CLOCK)
    def test_it_does_not_count_wall_clock_time(self, unit: TimeUnit) -> None:
        with pytest.raises(ValueError, match=f'a timestamp has no "{unit}": it does not count wall-clock time'):
            Timestamp().get(unit)

    def test_its_state_makes_an_equal_timestamp(self):
        timestamp = Timestamp(epoch=1, batch=2, sample=3, batch_in_epoch=4, sample_in_epoch=5)
        state = timestamp.state_dict()
        assert sorted(state) == sorted(field.name for field in dataclasses.fields(Timestamp))
        assert Timestamp.from_state_dict(state) == timestamp

    def test_a_copy_changes_the_counters_that_are_named(self) -> None:
        timestamp = Timestamp(epoch=2, batch=10, sample=40, batch_in_epoch=3, sample_in_epoch=12)
        changed = Timestamp(epoch=2, batch=11, sample=40, batch_in_epoch=3, sample_in_epoch=12)
        assert timestamp.copy() == timestamp
        assert timestamp.copy(batch=11) == changed
        with pytest.raises(TypeError, match="token"):
            timestamp.copy(token=3)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
    def test_copies_are_equal_with_equal_hashes(self, copied: Callable[[Timestamp], Timestamp]) -> None:
        timestamp = Timestamp(epoch=1, batch=2, sample=3, batch_in_epoch=4, sample_in_epoch=5)
        assert copied(timestamp) == timestamp
        assert hash(copied(timestamp)) == hash(timestamp)

    def test_it_compares_with_times_of_every_counted_unit(self) -> None:
        timestamp = Timestamp(epoch=2, batch=10, sample=40)
        for now in ("2ep", "10ba", Time(40, "sp")):
            assert timestamp == now
            assert timestamp >= now
            assert timestamp <= now
        assert Time(1, "ep") < timestamp < "11ba"
        assert timestamp > "39sp"
        assert timestamp != "3ep"
        assert timestamp != "soon"

    @pytest.mark.parametrize("compare", COMPARISONS)
    def test_it_has_no_order_with_fractions_and_numbers(self, compare: Callable[[Any, Any], bool]) -> None:
        with pytest.raises(ValueError, match='no "dur"'):
            compare(Timestamp(), "0.5dur")
        with pytest.raises(TypeError, match="must be a Time or a time string"):
            compare(Timestamp(), 3)


class TestCounters:
    NAMES = (
        ("epoch", "ep"),
        ("batch", "ba"),
        ("sample", "sp"),
        ("batch_in_epoch", "ba"),
        ("sample_in_epoch", "sp"),
    )

    @pytest.mark.parametrize(("name", "unit"), NAMES)
    def test_a_counter_compares_with_times_strings_and_numbers(self, name: str, unit: str) -> None:
        count = getattr(Timestamp(**{name: 3}), name)
        for equal in (3, f"3{unit}", Time(3, unit)):
            assert count == equal
            assert equal == count
            assert not count != equal  # noqa: SIM202  # __ne__ itself
            assert count <= equal
            assert count >= equal
            assert not count < equal
            assert not count > equal
        for less, more in ((2, 4), (f"2{unit}", f"4{unit}"), (Time(2, unit), Time(4, unit)), (2.5, 3.5)):
            assert less < count < more
            assert less <= count <= more
            assert more > count > less
            assert count not in (less, more)

    @pytest.mark.parametrize("compare", COMPARISONS)
    @pytest.mark.parametrize("other", ["3ep", Time(3, "ep")])
    def test_a_counter_has_no_order_with_a_time_of_another_unit(
        self, other: Any, compare: Callable[[Any, Any], bool]
    ) -> None:
        assert Timestamp(batch=3).batch != other
        with pytest.raises(ValueError, match="different units cannot be combined"):
            compare(Timestamp(batch=3).batch, other)

    def test_a_counter_combines_with_times_of_its_unit_only(self) -> None:
        batch = Timestamp(batch=7).batch
        assert batch + Time(3, "ba") == Time(3, "ba") + batch == Time(10, "ba")
        assert batch - Time(3, "ba") == Time(4, "ba")
        assert batch % Time(4, "ba") == Time(3, "ba")
        assert batch / Time(14, "ba") == Time(0.5, "dur")
        assert Time(14, "ba") / batch == Time(2.0, "dur")
        assert Time.from_input(batch) == Time(7, "ba")
        with pytest.raises(ValueError, match="different units cannot be combined"):
            batch + Time(3, "ep")

    def test_a_counter_is_an_int_wherever_one_is_needed(self) -> None:
        batch = Timestamp(batch=7).batch
        assert (f"{batch}", repr(batch), json.dumps(batch)) == ("7", "7", "7")
        assert hash(batch) == hash(7)
        assert {7: "found"}[batch] == "found"
        assert type(batch.value) is type(batch + 1) is type(batch % 3) is int
        assert list(range(batch)) == list(range(7))

    def test_the_state_of_a_timestamp_is_plain_ints(self) -> None:
        assert {type(value) for value in Timestamp(epoch=1).to_next_batch(4).state_dict().values()} == {int}
