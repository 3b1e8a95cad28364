"""The sample method: only kept rows are computed, with correct outputs and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.algorithms.stochastic_depth.rows import add_to_rows, take_rows

MASKS = ["1000", "0001", "0110", "1010", "0101", "1101"]

# Some rows are chosen and some are not, in runs of any length.
masks = st.lists(st.booleans(), min_size=2, max_size=12).filter(lambda chosen: len(set(chosen)) == 2).map(np.array)


def mask(text: str) -> np.ndarray:
    return np.array([character == "1" for character in text])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("relu", [False, True])
@given(chosen=masks)
def test_values_and_gradients_equal_indexing(
    chosen: np.ndarray, memory_format: torch.memory_format, relu: bool
) -> None:
    shape = (len(chosen), 3, 5, 5)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)

    out = add_to_rows(x, chosen, torch.sin, alpha=1.5, relu=relu)
    assert out.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    assert gradient.is_contiguous(memory_format=memory_format)

    summed = x + 1.5 * x.sin()
    expected = torch.where(torch.tensor(chosen)[:, None, None, None], summed.relu() if relu else summed, x)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    assert (expected == 0).any() == relu
    assert torch.allclose(out, expected, rtol=1e-12, atol=0)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-12)


@given(chosen=masks)
def test_only_the_chosen_rows_are_computed(chosen: np.ndarray) -> None:
    seen: list[list[float]] = []
    x = torch.arange(float(len(chosen)))[:, None]
    add_to_rows(x, chosen, lambda rows: seen.append(rows.flatten().tolist()) or rows)
    assert seen == [np.flatnonzero(chosen).tolist()]


@given(chosen=masks, dim=st.integers(0, 1))
def test_take_rows_takes_the_chosen_rows_in_order(chosen: np.ndarray, dim: int) -> None:
    x = torch.randn(len(chosen), len(chosen), 2)
    assert torch.equal(take_rows(x, chosen, dim), x.index_select(dim, torch.tensor(np.flatnonzero(chosen))))


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_keep_the_memory_format_of_the_values(text: str, relu: bool) -> None:
    """One gradient in another format would make every operation before it convert."""
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    hooked: list[bool] = []

    def function(rows: torch.Tensor) -> torch.Tensor:
        out = rows * 2
        out.register_hook(lambda grad: hooked.append(grad.is_contiguous(memory_format=torch.channels_last)))
        return out

    out = add_to_rows(x, mask(text), function, relu=relu)
    (gradient,) = torch.autograd.grad(out, x, torch.randn(4, 3, 5, 5))  # a gradient in the other format
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert hooked == [True]

    out = add_to_rows(x, mask(text), torch.sin, shortcut=torch.Tensor.contiguous)
    (gradient,) = torch.autograd.grad(out, x, torch.randn(4, 3, 5, 5))
    assert out.is_contiguous()
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_residual_may_not_change_its_input() -> None:
    """It may be a part of the batch that the shortcut still needs."""
    for text in ("1100", "1001"):
        x = torch.randn(4, 3, requires_grad=True) * 1
        with pytest.raises(RuntimeError, match="modified inplace"):
            add_to_rows(x, mask(text), lambda rows: rows.relu_() * 2)


@pytest.mark.parametrize("text", MASKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_adding_to_rows_equals_adding_zeros_elsewhere(text: str, memory_format: torch.memory_format) -> None:
    chosen = mask(text)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(4, 3, 5, 5, dtype=torch.float64)

    out = add_to_rows(x, chosen, torch.sin, shortcut=torch.cos, alpha=1.5)
    assert out.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    assert gradient.is_contiguous(memory_format=memory_format)

    expected = x.cos() + 1.5 * x.sin() * torch.tensor(chosen)[:, None, None, None]
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    assert torch.allclose(out, expected, rtol=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-12)


@pytest.mark.parametrize("text", MASKS)
def test_adding_to_rows_leaves_the_input_of_an_identity_shortcut_alone(text: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    before, weight = x.detach().clone(), torch.randn(4, 3)
    kept_weight = weight.clone()
    out = add_to_rows(x, mask(text), lambda rows: 2 * rows)
    (gradient,) = torch.autograd.grad(out, x, weight)
    factor = 1 + 2 * torch.tensor(mask(text))[:, None].float()
    assert torch.equal(x, before)
    assert torch.equal(weight, kept_weight)
    assert torch.allclose(out, before * factor)
    assert torch.allclose(gradient, weight * factor)


def test_rows_are_added_along_another_dimension() -> None:
    x = torch.randn(5, 4, 3)
    out = add_to_rows(x, mask("0110"), torch.ones_like, dim=1)
    assert torch.equal(out[:, [0, 3]], x[:, [0, 3]])
    assert torch.equal(out[:, 1:3], x[:, 1:3] + 1)


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_sum_of_two_types_has_the_wider_one(types: tuple[torch.dtype, torch.dtype]) -> None:
    """As under autocast, where the residual comes in half precision."""
    x = torch.randn(4, 3, dtype=types[0], requires_grad=True)
    out = add_to_rows(x, mask("0110"), lambda rows: rows.to(types[1]))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == types[0]
    assert torch.equal(x.grad[:, 0].float(), torch.tensor([1.0, 2.0, 2.0, 1.0]))


@pytest.mark.parametrize("text", MASKS)
def test_gradients_have_gradients(text: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    chosen = mask(text)
    assert torch.autograd.gradgradcheck(lambda t: add_to_rows(t, chosen, torch.sin, shortcut=torch.cos, alpha=1.5), x)
    assert torch.autograd.gradgradcheck(lambda t: add_to_rows(t, chosen, torch.sin, relu=True), x)
