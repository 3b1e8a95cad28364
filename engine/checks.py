"""Checks of numeric arguments: type and range."""

import math
from numbers import Real
from typing import Any


def check_int(
    name: str, value: Any, *, ge: int | None = None, gt: int | None = None, le: int | None = None, lt: int | None = None
) -> int:
    """Return `value` if it is an int (not a bool) within the bounds.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        ge: Inclusive lower bound.
        gt: Exclusive lower bound.
        le: Inclusive upper bound.
        lt: Exclusive upper bound.

    Raises:
        ValueError: Otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not _is_within(value, ge, gt, le, lt):
        raise ValueError(f"{name} must be an int{_bounds_text(ge, gt, le, lt)}, got {value!r:.100}")
    return value


def check_number(
    name: str,
    value: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> float:
    """Return `value` if it is a finite real number (not a bool) within the bounds.

    Args:
        name: Name of the argument, for the message.
        value: The argument.
        ge: Inclusive lower bound.
        gt: Exclusive lower bound.
        le: Inclusive upper bound.
        lt: Exclusive upper bound.

    Raises:
        ValueError: Otherwise.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not _is_within(value, ge, gt, le, lt):
        raise ValueError(f"{name} must be a finite number{_bounds_text(ge, gt, le, lt)}, got {value!r:.100}")
    return value


def _is_within(value: float, ge: float | None, gt: float | None, le: float | None, lt: float | None) -> bool:
    return (
        (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
        and (lt is None or value < lt)
    )


def _bounds_text(ge: float | None, gt: float | None, le: float | None, lt: float | None) -> str:
    bounds = {">=": ge, ">": gt, "<=": le, "<": lt}
    return " and".join(f" {sign} {bound}" for sign, bound in bounds.items() if bound is not None)
