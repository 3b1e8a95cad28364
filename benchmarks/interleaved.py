"""Interleaved timing of several variants, so that other load on the machine affects all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping


def time_in_turns(steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 4) -> dict[str, list[float]]:
    """Time each variant once per round, in random order.

    Args:
        steps: The variants by name.
        rounds: Number of timed rounds.
        warmup: Number of rounds before, which are not timed.

    Returns:
        The seconds of each call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(warmup + rounds):
        for name in random.sample(names, len(names)):  # so that no variant always follows the same one
            step = steps[name]
            started = time.perf_counter()
            step()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def trimmed_mean(seconds: list[float]) -> float:
    """The mean without the slowest tenth, which other processes have caused."""
    ordered = sorted(seconds)
    return statistics.mean(ordered[: len(ordered) - len(ordered) // 10])
