"""Property tests of checkpoint files."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.trainer.checkpoint.file import VERSION, read_checkpoint, write_checkpoint
from helpers.checkpoint_files import same

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Contiguous ones, transposed ones and views, empty ones and scalars."""
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    tensor = torch.randint(-9, 9, shape).to(draw(st.sampled_from(DTYPES)))
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    if tensor.dim() and tensor.shape[0] and draw(st.booleans()):
        tensor = tensor[1:]
    return tensor


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors()
keys = st.text() | st.integers()
contents = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=30)
@given(contents)
def test_a_round_trip_keeps_the_contents(value: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ep0-ba0.pt"
        write_checkpoint(path, {"version": VERSION, "value": value})
        assert same(read_checkpoint(path)["value"], value)
