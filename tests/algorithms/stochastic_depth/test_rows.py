import numpy as np
import pytest
import torch

from etude.algorithms.stochastic_depth.rows import replace_rows, take_rows

MASKS = ["1000", "0001", "0110", "1010", "0101", "1101"]


def mask(text: str) -> np.ndarray:
    return np.array([character == "1" for character in text])


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_equal_indexing(text: str, memory_format: torch.memory_format) -> None:
    chosen = mask(text)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(4, 3, 5, 5, dtype=torch.float64)

    out = replace_rows(x, chosen, lambda rows: rows.sin())
    assert out.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)

    expected = torch.where(torch.tensor(chosen)[:, None, None, None], x.sin(), x)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    assert torch.equal(out, expected)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-12)


@pytest.mark.parametrize("text", MASKS)
def test_only_the_chosen_rows_are_computed(text: str) -> None:
    chosen = mask(text)
    seen = []
    replace_rows(torch.arange(4.0)[:, None], chosen, lambda rows: seen.append(rows.flatten().tolist()) or rows)
    assert seen == [np.flatnonzero(chosen).tolist()]


@pytest.mark.parametrize("text", MASKS)
def test_take_rows_takes_the_chosen_rows_in_order(text: str) -> None:
    chosen = mask(text)
    x = torch.randn(4, 6)
    assert torch.equal(take_rows(x, chosen), x[torch.tensor(chosen)])


@pytest.mark.parametrize("text", MASKS)
def test_gradients_keep_the_memory_format_of_the_values(text: str) -> None:
    """One gradient in another format would make every operation before it convert."""
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    hooked: list[bool] = []

    def function(rows: torch.Tensor) -> torch.Tensor:
        out = rows * 2
        out.register_hook(lambda grad: hooked.append(grad.is_contiguous(memory_format=torch.channels_last)))
        return out

    out = replace_rows(x, mask(text), function)
    (gradient,) = torch.autograd.grad(out, x, torch.randn(4, 3, 5, 5))  # a gradient in the other format
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert hooked == [True]
