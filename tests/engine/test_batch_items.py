"""`State.batch_get_item` and `State.batch_set_item`."""

from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from etude.engine import State

Pair = namedtuple("Pair", ["inputs", "targets"])
second = lambda batch: batch[1]  # noqa: E731
with_second = lambda batch, value: (batch[0], value)  # noqa: E731


@pytest.mark.parametrize(
    ("batch", "key", "expected"),
    [
        (("x", "y"), 1, ("x", "new")),
        (["x", "y"], -1, ["x", "new"]),
        (Pair("x", "y"), 1, Pair("x", "new")),
        (Pair("x", "y"), "targets", Pair("x", "new")),
        ({"inputs": "x", "targets": "y"}, "targets", {"inputs": "x", "targets": "new"}),
        (OrderedDict(a="x", b="y"), "b", OrderedDict(a="x", b="new")),
        (SimpleNamespace(inputs="x", targets="y"), "targets", SimpleNamespace(inputs="x", targets="new")),
        (("x", "y"), (second, with_second), ("x", "new")),
    ],
)
def test_a_part_is_replaced_and_the_container_of_the_dataloader_is_not(batch: Any, key: Any, expected: Any) -> None:
    state = State(model=nn.Identity(), batch=batch)
    assert state.batch_get_item(key) == "y"
    state.batch_set_item(key, "new")
    assert state.batch == expected
    assert type(state.batch) is type(batch)
    assert state.batch_get_item(key) == "new"
    state.batch = batch
    assert state.batch_get_item(key) == "y"
