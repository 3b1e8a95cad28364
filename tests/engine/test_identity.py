"""Settings as plain values: stable between processes, different for different code."""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from etude.engine import Algorithm, Callback, Event, Time
from etude.engine.identity import as_text, describe, find_opaque, represent


class Color(Enum):
    RED = 1


class Silent(Algorithm):
    def match(self, event: Event, state: Any) -> bool:
        return False

    def apply(self, event: Event, state: Any, logger: Any) -> None: ...


class Plain(Silent):
    """Keeps its arguments as attributes, one of them private, and counts in a private one."""

    def __init__(self, rate: float, hidden: Any = None, *more: Any) -> None:
        self.rate, self._hidden, self._count = rate, hidden, 0


class Forgetful(Silent):
    def __init__(self, rate: float) -> None:
        self._factor = 1 - rate


@dataclass(eq=False, repr=False)
class Fields(Silent):
    rate: float = 0.5
    policy: Any = None
    cache: Any = field(default=None, compare=False)
    count: int = field(default=0, init=False)


class Subclass(Fields):
    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra


class Schedule:
    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, time: float) -> float:
        return time**self.power


class OtherSchedule(Schedule):
    def __call__(self, time: float) -> float:
        return 1 - time**self.power


def power(exponent: int) -> Callable[[float], float]:
    return lambda time: time**exponent


def scaled(time: float, factor: float = 1.0, *, offset: float = 0.0) -> float:
    return time * factor + offset


def nested(time: float) -> float:
    return sum(x * 2.0 for x in (time, time) if x in {"a", "b", "c"} or x > 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.25, 0.25),
        (float("nan"), "nan"),
        (-math.inf, "-inf"),
        ("text", "text"),
        (Color.RED, "Color.RED"),
        (Time(3, "ep"), "3ep"),
        (Path("a/b"), "a/b"),
        (torch.float16, "torch.float16"),
        (torch.device("cpu"), "cpu"),
        (np.float64(0.5), 0.5),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([[0.5], [math.nan]]), [[0.5], ["nan"]]),
        ((1, [2, "x"]), [1, [2, "x"]]),
        ({3, 1, 2}, [1, 2, 3]),
        ({1: "a", "b": (2,)}, {"1": "a", "b": [2]}),
        (Plain(0.5, "x"), {"class": "Plain", "rate": 0.5, "hidden": "x"}),
        (Fields(0.1), {"class": "Fields", "rate": 0.1, "policy": None}),
        (math.sqrt, {"function": "math.sqrt"}),
        (nn.functional.relu, {"function": "torch.nn.functional.relu"}),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_values_become_plain(value: Any, expected: Any) -> None:
    assert describe(value) == expected
    assert json.loads(json.dumps(describe(value))) == expected


def test_a_subclass_that_is_no_dataclass_is_compared_by_its_attributes_too() -> None:
    assert describe(Subclass(1)) != describe(Subclass(2))
    assert describe(Subclass(1))["rate"] == 0.5


DIFFERENT: list[tuple[Any, Any]] = [
    (lambda t: t, lambda t: t * t),
    (lambda t: 0.5, lambda t: 0.25),
    (lambda t: 1, lambda t: True),
    (lambda t: (lambda: 1)(), lambda t: (lambda: 2)()),
    (lambda t, k=1: t, lambda t, k=2: t),
    (lambda t, *, k=1: t, lambda t, *, k=2: t),
    (lambda t: t.real, lambda t: t.imag),
    (lambda t: t in {1, 2}, lambda t: t in {1, 3}),
    (lambda a, b: a, lambda b, a: b),
    (power(2), power(3)),
    (scaled, nested),
    (functools.partial(scaled, factor=2.0), functools.partial(scaled, factor=3.0)),
    (functools.partial(scaled, 1.0), functools.partial(scaled, 2.0)),
    (functools.partial(power(2)), functools.partial(power(3))),
    (Schedule(1), Schedule(2)),
    (Schedule(1), OtherSchedule(1)),
    (Schedule(1).__call__, Schedule(2).__call__),
    (functools.cache(power(2)), functools.cache(power(3))),
    (Plain(0.5), Plain(0.25)),
    (Plain(0.5, Schedule(1)), Plain(0.5, Schedule(2))),
    (Plain(0.5, power(2)), Plain(0.5, power(3))),
    (Fields(policy=Fields(0.1)), Fields(policy=Fields(0.2))),
    (list(range(100)), [*range(99), 0]),
    ([0.1] * 100, [0.1] * 101),
    ([power(2)] * 100, [power(3)] * 100),
    (torch.zeros(100), torch.eye(10).reshape(100)),
    (torch.zeros(100), torch.zeros(10, 10)),
    (torch.zeros(100), torch.zeros(100, dtype=torch.bfloat16)),
    (np.zeros(100), np.ones(100)),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different_settings_have_different_descriptions(one: Any, other: Any) -> None:
    assert describe(one) != describe(other)
    assert describe(one) == describe(one)
    assert find_opaque(describe(one)) == []


def test_a_function_that_has_run_often_is_described_as_before() -> None:
    """The interpreter rewrites the code of a function that is hot."""
    before = describe(nested), describe(scaled)
    for _ in range(5000):
        nested(0.5)
        scaled(1.0)
    assert (describe(nested), describe(scaled)) == before


def test_a_recursive_closure_terminates() -> None:
    def count(n: int) -> int:
        return n and count(n - 1)

    assert describe(count)["closure"] == {"count": "..."}


def test_an_unassigned_variable_of_a_closure_is_not_comparable() -> None:
    def make() -> Callable[[], int]:
        def function() -> int:
            return later

        if len(sys.argv) < 0:
            later = 1
        return function

    assert find_opaque(describe(make())) == ["closure.later (not assigned yet)"]


def test_settings_that_cannot_be_compared_are_found_by_name() -> None:
    first, second = Plain(nn.Linear(2, 2)), Plain(nn.Linear(2, 2))  # type: ignore[arg-type]
    assert describe(first) == describe(second)
    assert find_opaque(describe(first)) == ["rate (Linear)"]
    assert find_opaque(describe(Forgetful(0.5))) == ["rate (not kept as an attribute)"]
    assert find_opaque({"algorithms": [describe(Plain([object()]))]}) == ["algorithms.0.rate.0 (object)"]  # type: ignore[arg-type]
    assert find_opaque(describe([object()] * 100)) == [" (list of 100)"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Plain(0.5, Schedule(2)), "Plain(rate=0.5, hidden=Schedule(power=2))"),
        (Fields(policy=[1, {"a": None}]), "Fields(rate=0.5, policy=[1, {'a': None}])"),
        (Fields(policy=functools.partial(math.pow, 2)), "Fields(rate=0.5, policy=partial(math.pow, 2))"),
        (Fields(policy=nn.Linear(2, 2)), "Fields(rate=0.5, policy=<Linear>)"),
        (Forgetful(0.5), "Forgetful()"),
        (Silent(), "Silent()"),
        (Callback(), "Callback()"),
    ],
)
def test_representation_is_the_call_that_builds_it(value: Any, text: str) -> None:
    assert repr(value) == represent(value) == text


def test_no_representation_holds_an_address() -> None:
    for value in (power(2), functools.partial(scaled, 1), Schedule(1), scaled, Schedule(1).__call__, object()):
        assert "0x" not in as_text(describe(Plain(0.5, value)))


def test_repr_shows_only_arguments() -> None:
    algorithm = Plain(0.5)
    algorithm.losses = [1.0, 2.0]  # type: ignore[attr-defined]
    assert repr(algorithm) == "Plain(rate=0.5, hidden=None)"
    assert describe(algorithm)["losses"] == [1.0, 2.0]


PROGRAM = """
import functools, json
from etude.engine.identity import describe
def make(k):
    return lambda t, names=frozenset(["a", "b", "c"]): t ** k if t in {"x", "y", "z"} else names
class Schedule:
    def __init__(self, f): self.f = f
    def __call__(self, t): return self.f(t)
print(json.dumps(describe([make(3), functools.partial(make, 2), Schedule(make(1)), {"b", "a"}])))
"""


def test_the_same_program_gives_the_same_description_in_another_process() -> None:
    """Processes differ in their addresses and in the order of sets."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert "sha256" not in runs[0]
