"""Drop rates over depth: the rate of each block, computed from `drop_rate`."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Literal

from ...engine.checks import check_number

DropDistribution = Literal["linear", "uniform"] | Sequence[float] | Callable[[int, int], float]

_DISTRIBUTIONS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda block, num_blocks: block / num_blocks,
    "uniform": lambda block, num_blocks: 1.0,
}


def rates_over_depth(drop_rate: float, drop_distribution: DropDistribution, num_blocks: int) -> list[float]:
    """The drop rate of each block, first to last: `drop_rate` times a multiplier.

    Args:
        drop_rate: In [0, 1]; with the named distributions that of the last block.
        drop_distribution: ``linear`` multiplies for block l of L by ``l / L`` (Huang et al. 2016,
            equation 4 in terms of drop instead of survival), ``uniform`` by 1; a sequence gives the L
            multipliers, and a function is called with l from 1 to L, and with L.
        num_blocks: The number L, at least 1.

    Raises:
        TypeError: If a multiplier is not a number.
        ValueError: If there are not L multipliers, or one gives a rate outside [0, 1].
    """
    multipliers = multipliers_over_depth(drop_distribution, num_blocks)
    if len(multipliers) != num_blocks:
        raise ValueError(
            f"drop_distribution must give one multiplier for each of the {num_blocks} blocks, got {len(multipliers)}"
        )
    return [_rate(drop_rate, multiplier, block) for block, multiplier in enumerate(multipliers, start=1)]


def multipliers_over_depth(drop_distribution: DropDistribution, num_blocks: int) -> list[float]:
    """What a distribution multiplies `drop_rate` by at each block; the length of a sequence is not checked."""
    if isinstance(drop_distribution, str):
        drop_distribution = _DISTRIBUTIONS[drop_distribution]
    if callable(drop_distribution):
        return [drop_distribution(block, num_blocks) for block in range(1, num_blocks + 1)]
    return list(drop_distribution)


def _rate(drop_rate: float, multiplier: float, block: int) -> float:
    if isinstance(multiplier, bool) or not isinstance(multiplier, Real):
        raise TypeError(f"drop_distribution must give numbers, got {multiplier!r} for block {block}")
    rate = drop_rate * float(multiplier)
    if not 0 <= rate <= 1:
        raise ValueError(
            f"drop_distribution must give rates in [0, 1], got {multiplier!r} * {drop_rate} for block {block}"
        )
    return rate


def check_rate(drop_rate: float) -> float:
    """Validate a drop rate.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1].
    """
    return check_number("drop_rate", drop_rate, ge=0, le=1)


def check_distribution(drop_distribution: DropDistribution) -> None:
    """Raise a ValueError if `drop_distribution` is neither a known name, nor a sequence, nor a function."""
    if isinstance(drop_distribution, str):
        is_known = drop_distribution in _DISTRIBUTIONS
    else:
        is_known = callable(drop_distribution) or hasattr(drop_distribution, "__len__")
    if not is_known:
        known = ", ".join(map(repr, _DISTRIBUTIONS))
        raise ValueError(
            f"drop_distribution must be one of {known}, a sequence or a function, got {drop_distribution!r}"
        )
