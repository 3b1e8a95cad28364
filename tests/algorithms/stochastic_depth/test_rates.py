import pytest

from etude.algorithms.stochastic_depth.rates import check_rate, rates_over_depth


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
