import pytest
import torch

from etude.core import Precision, get_precision_context


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), (Precision.AMP_BF16, torch.bfloat16), ("amp_bf16", torch.bfloat16)],
)
def test_a_forward_pass_in_the_context_has_its_dtype(precision: str, dtype: torch.dtype) -> None:
    with get_precision_context(precision, "cpu"):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def test_a_precision_equals_its_value() -> None:
    assert Precision.AMP_FP16 == "amp_fp16"
    with pytest.raises(ValueError, match="'fp8' is not a valid Precision"):
        get_precision_context("fp8")
