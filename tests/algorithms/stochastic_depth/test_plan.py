"""Drop plans: distribution of the draws, seeds, ranks, microbatches."""

import random

import numpy as np
import pytest
import torch

from etude.algorithms.stochastic_depth.plan import DropPlan

RATES = [0.0, 0.001, 0.1, 0.35, 0.5, 0.9, 1.0]
STEPS = 4000


def draws_of(method: str, draws: str, rates: list[float] = RATES, steps: int = STEPS, num_rows: int = 16) -> np.ndarray:
    """Dropped fractions of shape ``(steps, blocks)``."""
    plan = DropPlan(rates, method=method, draws=draws, seed=7)
    fractions = []
    for step in range(steps):
        plan.draw(step, num_rows=num_rows)
        fractions.append(plan.dropped_fractions())
    return np.array(fractions)


@pytest.mark.parametrize("draws", ["independent", "balanced"])
@pytest.mark.parametrize("method", ["block", "sample"])
def test_every_block_is_dropped_at_its_rate(method: str, draws: str) -> None:
    """A two-sided test of each mean at 5 sigma; 0 and 1 exactly."""
    num_rows = 16 if (method, draws) == ("sample", "independent") else 1  # decisions that are independent in a draw
    means = draws_of(method, draws).mean(axis=0)
    for rate, mean in zip(RATES, means, strict=True):
        sigma = np.sqrt(rate * (1 - rate) / (STEPS * num_rows))
        assert abs(mean - rate) <= 5 * sigma
    assert means[0] == 0
    assert means[-1] == 1


def test_balanced_block_draws_stay_within_one_of_the_mean_number() -> None:
    rates = [0.2 * block / 16 for block in range(1, 17)]
    numbers = draws_of("block", "balanced", rates).sum(axis=1)
    assert set(numbers) == {1, 2}  # the mean is 1.7


def test_balanced_sample_draws_drop_quarters_of_the_batch() -> None:
    numbers = 16 * draws_of("sample", "balanced", [0.35])
    assert set(numbers.round(6).ravel()) == {4, 8}  # the mean is 5.6


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 29])
def test_balanced_sample_draws_are_exact_for_every_batch_size(num_rows: int) -> None:
    rates = [0.0, 0.1, 0.4, 0.75, 1.0]
    fractions = draws_of("sample", "balanced", rates, num_rows=num_rows)
    assert set(fractions[:, 0]) == {0.0}
    assert set(fractions[:, -1]) == {1.0}
    sigma = 0.5 / np.sqrt(STEPS)  # of one draw for all rows, which is the largest it can be
    assert np.abs(fractions.mean(axis=0) - rates).max() < 5 * sigma


def test_every_row_of_a_balanced_sample_draw_has_the_same_rate() -> None:
    plan = DropPlan([0.3], method="sample", draws="balanced")
    kept = np.zeros(12)
    for step in range(STEPS):
        plan.draw(step, num_rows=12)
        kept += plan.kept_rows(0)
    assert np.abs(1 - kept / STEPS - 0.3).max() < 5 * np.sqrt(0.21 / STEPS)


def test_balanced_draws_can_drop_any_two_blocks_together() -> None:
    """Without a random order, neighbours on the line would exclude each other for ever."""
    dropped = draws_of("block", "balanced", [0.5] * 6)
    together = dropped.T @ dropped
    assert together.min() > 0


def test_independent_draws_of_two_blocks_are_independent() -> None:
    dropped = draws_of("block", "independent", [0.3, 0.6])
    both = (dropped[:, 0] * dropped[:, 1]).mean()
    assert abs(both - 0.18) < 5 * np.sqrt(0.18 * 0.82 / STEPS)


@pytest.mark.parametrize("draws", ["independent", "balanced"])
def test_a_row_is_dropped_independently_in_different_blocks(draws: str) -> None:
    plan = DropPlan([0.4, 0.4], method="sample", draws=draws)
    both = 0
    for step in range(STEPS):
        plan.draw(step, num_rows=8)
        both += np.mean(~plan.kept_rows(0) & ~plan.kept_rows(1))
    assert abs(both / STEPS - 0.16) < 0.012


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("draws", ["independent", "balanced"])
def test_a_draw_is_a_function_of_seed_and_step(method: str, draws: str) -> None:
    first, second = (draws_of(method, draws, steps=20) for _ in range(2))
    assert np.array_equal(first, second)
    plan = DropPlan(RATES, method=method, draws=draws, seed=7)
    plan.draw(13, num_rows=16)  # replayed without the twelve before
    assert plan.dropped_fractions() == first[13].tolist()


def test_seeds_and_steps_draw_differently() -> None:
    def dropped(seed: int, step: int) -> tuple[float, ...]:
        plan = DropPlan([0.5] * 32, method="block", seed=seed)
        plan.draw(step)
        return tuple(plan.dropped_fractions())

    assert len({dropped(seed, step) for seed in range(5) for step in range(5)}) == 25


def test_ranks_agree_by_default_and_differ_if_asked() -> None:
    def dropped(same: bool, rank: int) -> list[float]:
        plan = DropPlan([0.5] * 32, method="block", same_on_all_ranks=same)
        plan.draw(3, rank=rank)
        return plan.dropped_fractions()

    assert dropped(True, 0) == dropped(True, 1)
    assert dropped(False, 0) != dropped(False, 1)


@pytest.mark.parametrize("method", ["block", "sample"])
def test_balanced_draws_give_every_rank_the_same_amount_of_work(method: str) -> None:
    plan = DropPlan([0.3] * 12, method=method, draws="balanced", same_on_all_ranks=False)
    for step in range(50):
        amounts, patterns = set(), set()
        for rank in range(4):
            plan.draw(step, rank=rank, num_rows=16)
            amounts.add(round(sum(plan.dropped_fractions()), 9))
            rows = [] if method == "block" else [plan.kept_rows(block).tobytes() for block in range(12)]
            patterns.add((tuple(plan.dropped_fractions()), *rows))
        assert len(amounts) == 1
        assert len(patterns) > 1


def test_no_global_generator_is_read_or_advanced() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    DropPlan(RATES, method="sample").draw(0, num_rows=8)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


def test_microbatches_see_their_part_of_the_rows() -> None:
    plan = DropPlan([0.5], method="sample")
    plan.draw(0, num_rows=10)
    whole = plan.kept_rows(0)
    parts = []
    for start in range(0, 10, 4):
        plan.set_microbatch(start, min(4, 10 - start))
        parts.append(plan.kept_rows(0))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert np.array_equal(np.concatenate(parts), whole)
