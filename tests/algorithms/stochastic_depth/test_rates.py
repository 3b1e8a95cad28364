import pytest

from etude.algorithms.stochastic_depth.rates import check_distribution, check_rate, rates_over_depth


def test_linear_rates_follow_huang_et_al() -> None:
    assert rates_over_depth(0.5, "linear", 54) == [0.5 * block / 54 for block in range(1, 55)]


def test_linear_rates_end_at_exactly_the_drop_rate_and_drop_a_quarter_of_the_depth() -> None:
    """Huang et al. 2016, section 3: at 0.5 the expected number of kept blocks is (3L - 1) / 4."""
    for num_blocks in (1, 2, 3, 16, 33, 50, 54, 1202):
        rates = rates_over_depth(0.5, "linear", num_blocks)
        assert rates[-1] == 0.5
        assert num_blocks - sum(rates) == pytest.approx((3 * num_blocks - 1) / 4)


def test_uniform_rates_are_all_the_drop_rate() -> None:
    assert rates_over_depth(0.3, "uniform", 5) == [0.3] * 5


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), float("inf")])
def test_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\], got"):
        check_rate(rate)


@pytest.mark.parametrize("rate", ["0.2", None, True, [0.2]])
def test_rate_that_is_no_number_is_refused(rate: object) -> None:
    with pytest.raises(TypeError, match=r"drop_rate must be a number in \[0, 1\], got"):
        check_rate(rate)


def test_multipliers_and_a_function_of_place_give_the_rates() -> None:
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
