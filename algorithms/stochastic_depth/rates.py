"""Drop rates over depth and over time."""

from collections.abc import Callable
from numbers import Real
from typing import Literal

from ...engine import State, Time, TimeUnit, as_time

DropDistribution = Literal["linear", "uniform"]

_DISTRIBUTIONS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda block, num_blocks: block / num_blocks,
    "uniform": lambda block, num_blocks: 1.0,
}


def rates_over_depth(drop_rate: float, drop_distribution: DropDistribution, num_blocks: int) -> list[float]:
    """The drop rate of each block, first to last.

    Args:
        drop_rate: Of the last block, in [0, 1].
        drop_distribution: ``linear`` gives block l of L the rate ``l / L * drop_rate`` for l = 1..L
            (Huang et al. 2016, equation 4 in terms of drop instead of survival), ``uniform`` gives
            every block `drop_rate`.
        num_blocks: The number L.
    """
    share = _DISTRIBUTIONS[drop_distribution]
    return [drop_rate * share(block, num_blocks) for block in range(1, num_blocks + 1)]


def check_rate(drop_rate: float) -> float:
    """Refuse what is not a drop rate.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in [0, 1].
    """
    if isinstance(drop_rate, bool) or not isinstance(drop_rate, Real):
        raise TypeError(f"drop_rate must be a number in [0, 1], got {drop_rate!r}")
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate must be in [0, 1], got {drop_rate!r}")
    return float(drop_rate)


def check_distribution(drop_distribution: str) -> None:
    """Refuse an unknown distribution with a ValueError."""
    if drop_distribution not in _DISTRIBUTIONS:
        known = ", ".join(map(repr, _DISTRIBUTIONS))
        raise ValueError(f"drop_distribution must be one of {known}, got {drop_distribution!r}")


class Warmup:
    """The factor on all rates over time: from 0 at the first batch in a line to 1 at the end of `span`.

    Args:
        span: A `Time`, a time string, or a number that is a fraction of the whole training.

    Raises:
        TypeError: If `span` is none of these.
        ValueError: If it is negative, of an unknown unit, or a fraction above 1.
    """

    def __init__(self, span: float | str | Time) -> None:
        is_fraction = isinstance(span, (int, float)) and not isinstance(span, bool)
        self.span = Time(float(span), TimeUnit.DURATION) if is_fraction else as_time(span, "drop_warmup")  # type: ignore
        if self.span < 0:
            raise ValueError(f"drop_warmup must not be negative, got {self.span}")
        if self.span.unit is TimeUnit.DURATION and self.span > 1:
            raise ValueError(f"drop_warmup must not be longer than the training, got {self.span}")

    def check_fits(self, state: State) -> None:
        """Refuse a warmup that the training never finishes.

        Raises:
            ValueError: If it is longer than ``state.max_duration``, or cannot be measured in it.
        """
        if not self.span:
            return
        state.progress(self.span)  # raises where an epoch has no known length
        span, whole = self.span, state.max_duration
        if whole is None:
            return
        if span.unit is whole.unit:
            is_longer = span > whole
        else:
            span_in_epochs, whole_in_epochs = state.in_epochs(span), state.in_epochs(whole)
            is_longer = span_in_epochs is not None and whole_in_epochs is not None and span_in_epochs > whole_in_epochs
        if is_longer:
            raise ValueError(f'drop_warmup must not be longer than max_duration="{whole}", got "{span}"')

    def __call__(self, state: State) -> float:
        """The factor in [0, 1] for the batch that comes next; exactly 1 from the end of the span on."""
        return min(1.0, state.progress(self.span)) if self.span else 1.0
