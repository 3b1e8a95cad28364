"""Property tests of splitting batches."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.trainer.data.batches import num_samples, split

FORMS = {
    "tensor": lambda rows: rows,
    "tuple": lambda rows: (rows, rows.flatten()),
    "list": lambda rows: [rows, rows * 2],
    "dict": lambda rows: {"inputs": rows, "length": 3},
    "nested": lambda rows: ({"inputs": rows, "names": ["a"] * len(rows)}, [rows]),
}


def rows_of(batch: Any) -> torch.Tensor:
    """The first tensor of a batch."""
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


@given(st.sampled_from(sorted(FORMS)), st.integers(1, 40), st.integers(1, 50))
def test_microbatches_are_full_but_for_the_last_and_join_to_the_batch(form: str, num_rows: int, size: int) -> None:
    rows = torch.arange(num_rows)[:, None]
    batch = FORMS[form](rows)
    parts = list(split(batch, size))
    sizes = [num_samples(part) for part in parts]
    assert sizes[:-1] == [size] * (len(parts) - 1)
    assert 1 <= sizes[-1] <= size
    assert torch.equal(torch.cat([rows_of(part) for part in parts]), rows)
    assert {type(part) for part in parts} == {type(batch)}
    assert rows_of(parts[0]).data_ptr() == rows.data_ptr(), "no row is copied"
