"""Checks of numeric arguments: type and range."""

import math
from numbers import Real
from typing import Any


def check_int(
    name: str,
    value: Any,
    *,
    ge: int | None = None,
    gt: int | None = None,
    le: int | None = None,
    lt: int | None = None,
    alternative: str | None = None,
) -> int:
    """Return `value` if it is an int (not a bool) within the bounds.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        ge: Inclusive lower bound.
        gt: Exclusive lower bound.
        le: Inclusive upper bound.
        lt: Exclusive upper bound.
        alternative: Other values that the caller accepts, for the message, such as ``"-1 for all"``.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is out of bounds.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and _is_within(value, ge, gt, le, lt):
        return value
    rule = f"{name} must be an int{_bounds_text(ge, gt, le, lt)}{f', or {alternative}' if alternative else ''}"
    raise (ValueError if is_int else TypeError)(f"{rule}, got {value!r:.100}")


def check_number(
    name: str,
    value: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> float:
    """Return `value` as a float if it is a finite real number (not a bool) within the bounds.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        ge: Inclusive lower bound.
        gt: Exclusive lower bound.
        le: Inclusive upper bound.
        lt: Exclusive upper bound.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite or out of bounds.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and _is_within(value, ge, gt, le, lt):
        return float(value)
    bounds = _bounds_text(ge, gt, le, lt)
    rule = f"{name} must be a {'' if bounds.startswith(' in ') else 'finite '}number{bounds}"
    raise (ValueError if is_number else TypeError)(f"{rule}, got {value!r:.100}")


def _is_within(value: float, ge: float | None, gt: float | None, le: float | None, lt: float | None) -> bool:
    return (
        (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
        and (lt is None or value < lt)
    )


def _bounds_text(ge: float | None, gt: float | None, le: float | None, lt: float | None) -> str:
    """The bounds as ``" >= 1"``, or as an interval such as ``" in [0, 1)"``."""
    lower, upper = (gt if ge is None else ge), (lt if le is None else le)
    if lower is not None and upper is not None:
        return f" in {'(' if ge is None else '['}{lower}, {_power_of_two(upper)}{')' if le is None else ']'}"
    bounds = {">=": ge, ">": gt, "<=": le, "<": lt}
    return "".join(f" {sign} {bound}" for sign, bound in bounds.items() if bound is not None)


def _power_of_two(bound: float) -> str:
    is_power = isinstance(bound, int) and bound >= 2**16 and bound.bit_count() == 1
    return f"2**{int(bound).bit_length() - 1}" if is_power else str(bound)
