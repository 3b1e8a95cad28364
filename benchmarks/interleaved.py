"""Times several ways to do one thing in turns, so that a busy machine disturbs all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping


def time_in_turns(steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 4) -> dict[str, list[float]]:
    """Seconds of every step of every kind.

    Args:
        steps: By name, what to time.
        rounds: How many times each is done; in each round every one of them once.
        warmup: Rounds before, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(warmup + rounds):
        for name in random.sample(names, len(names)):  # each comes after each, so none profits from its place
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
