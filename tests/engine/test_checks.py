"""Checks of numeric arguments."""

import math
import re
from typing import Any

import numpy as np
import pytest

from etude.engine.checks import check_int, check_number


@pytest.mark.parametrize("value", [1, 2, 10**30])
def test_an_int_within_the_bounds_is_returned(value: int) -> None:
    assert check_int("size", value, ge=1) == value


@pytest.mark.parametrize("value", [True, 1.0, "1", None, np.int64(1), 1j])
def test_another_type_than_int_raises_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"size must be an int >= 1, got {value!r}")):
        check_int("size", value, ge=1)


@pytest.mark.parametrize(
    ("bounds", "value", "rule"),
    [
        ({"ge": 1}, 0, ">= 1"),
        ({"gt": 0}, 0, "> 0"),
        ({"le": 3}, 4, "<= 3"),
        ({"lt": 3}, 3, "< 3"),
        ({"ge": 1, "le": 3}, 4, "in [1, 3]"),
        ({"gt": 1, "lt": 3}, 1, "in (1, 3)"),
        ({"ge": 0, "lt": 2**32}, 2**32, "in [0, 2**32)"),
        ({"ge": 0, "le": 2**32 - 1}, -1, "in [0, 4294967295]"),
    ],
)
def test_an_int_out_of_bounds_raises_a_value_error(bounds: dict[str, int], value: int, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"size must be an int {rule}, got {value}")):
        check_int("size", value, **bounds)


def test_the_message_names_the_alternative_to_an_int() -> None:
    with pytest.raises(ValueError, match="size must be an int >= 1, or -1 for all, got 0"):
        check_int("size", 0, ge=1, alternative="-1 for all")


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.5), np.float64(1.0), np.int64(0)])
def test_a_number_within_the_bounds_is_returned_as_a_float(value: Any) -> None:
    assert check_number("rate", value, ge=0, le=1) == value
    assert type(check_number("rate", value, ge=0, le=1)) is float


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, [0.5]])
def test_another_type_than_a_number_raises_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"rate must be a number in [0, 1], got {value!r}")):
        check_number("rate", value, ge=0, le=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_raises_a_value_error(value: float) -> None:
    with pytest.raises(ValueError, match=f"rate must be a finite number, got {value}"):
        check_number("rate", value)


@pytest.mark.parametrize(
    ("bounds", "rule"), [({"gt": 0}, "a finite number > 0"), ({"gt": 0, "lt": 1}, "a number in (0, 1)")]
)
def test_a_number_out_of_bounds_raises_a_value_error(bounds: dict[str, float], rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"rate must be {rule}, got 0")):
        check_number("rate", 0, **bounds)


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(TypeError) as caught:
        check_int("size", "x" * 1000)
    assert len(str(caught.value)) < 150
