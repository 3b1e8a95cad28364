"""Drop rates over depth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.algorithms.stochastic_depth.rates import check_distribution, check_rate, rates_over_depth

rates = st.floats(0, 1)
numbers_of_blocks = st.integers(1, 1202)


@given(rates, numbers_of_blocks)
def test_linear_rates_grow_with_depth_to_exactly_the_drop_rate(rate: float, num_blocks: int) -> None:
    """Huang et al. 2016, equation 4."""
    found = rates_over_depth(rate, "linear", num_blocks)
    assert found == [rate * (block / num_blocks) for block in range(1, num_blocks + 1)]
    assert found[-1] == rate
    assert found == sorted(found)


@given(numbers_of_blocks)
def test_linear_rates_of_a_half_drop_a_quarter_of_the_depth(num_blocks: int) -> None:
    """Huang et al. 2016, section 3: at 0.5 the expected number of kept blocks is (3L - 1) / 4."""
    found = rates_over_depth(0.5, "linear", num_blocks)
    assert num_blocks - sum(found) == pytest.approx((3 * num_blocks - 1) / 4)


@given(rates, numbers_of_blocks)
def test_uniform_rates_are_all_the_drop_rate(rate: float, num_blocks: int) -> None:
    assert rates_over_depth(rate, "uniform", num_blocks) == [rate] * num_blocks


@given(rates, st.lists(rates, min_size=1, max_size=20))
def test_a_sequence_and_a_function_of_depth_give_the_same_rates(rate: float, multipliers: list[float]) -> None:
    def multiplier(block: int, num_blocks: int) -> float:
        assert num_blocks == len(multipliers)
        return multipliers[block - 1]

    found = rates_over_depth(rate, multipliers, len(multipliers))
    assert found == [rate * multiplier for multiplier in multipliers]
    assert rates_over_depth(rate, multiplier, len(multipliers)) == found


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_rate must be a number in \[0, 1\], got"):
        check_rate(rate)


@pytest.mark.parametrize("rate", ["0.2", None, True, [0.2]])
def test_a_rate_of_another_type_is_refused(rate: object) -> None:
    with pytest.raises(TypeError, match=r"drop_rate must be a number in \[0, 1\], got"):
        check_rate(rate)


def test_multipliers_and_a_function_of_depth_give_the_rates() -> None:
    assert rates_over_depth(0.5, [0, 1, 0.5], 3) == [0.0, 0.5, 0.25]
    assert rates_over_depth(0.5, lambda block, num_blocks: (block - 1) / (num_blocks - 1), 3) == [0.0, 0.25, 0.5]
    assert rates_over_depth(0.2, (2.0, 5), 2) == [0.4, 1.0]


@pytest.mark.parametrize(
    ("distribution", "error", "message"),
    [
        ([0.5, 0.5], ValueError, "must give one multiplier for each of the 3 blocks, got 2"),
        ([], ValueError, "must give one multiplier for each of the 3 blocks, got 0"),
        ([0.5, 0.5, -0.1], ValueError, r"must give rates in \[0, 1\], got -0.1 \* 0.5 for block 3"),
        ([0.5, 3.0, 0.1], ValueError, r"must give rates in \[0, 1\], got 3.0 \* 0.5 for block 2"),
        ([float("nan")] * 3, ValueError, r"must give rates in \[0, 1\], got nan \* 0.5 for block 1"),
        (["a", "b", "c"], TypeError, "must give numbers, got 'a' for block 1"),
        (lambda block, num_blocks: None, TypeError, "must give numbers, got None for block 1"),
        (lambda block, num_blocks: 7, ValueError, r"must give rates in \[0, 1\], got 7 \* 0.5 for block 1"),
    ],
)
def test_bad_multipliers_are_refused(distribution: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="drop_distribution " + message):
        rates_over_depth(0.5, distribution, 3)


@pytest.mark.parametrize("distribution", ["cosine", "", None, 0.5])
def test_an_unknown_distribution_is_refused(distribution: object) -> None:
    with pytest.raises(
        ValueError, match="drop_distribution must be one of 'linear', 'uniform', a sequence or a function"
    ):
        check_distribution(distribution)
