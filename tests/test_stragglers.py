"""`benchmarks/stragglers.py`."""

import importlib.util
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import etude
import etude.functional as cf
from etude.algorithms.stochastic_depth.draws import Draws
from etude.algorithms.stochastic_depth.plan import DropPlan
from etude.models import create_model

pytestmark = pytest.mark.xdist_group("stragglers")  # whose costly fixture is made once

SCRIPT = Path(etude.__file__).parent / "benchmarks" / "stragglers.py"
RANKS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def stragglers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stragglers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def costs(stragglers: ModuleType) -> Any:
    return stragglers.count("resnet50", 0.2)


@pytest.mark.parametrize("draws", ["independent", "balanced"])
def test_the_same_plan_saves_the_same_on_any_number_of_ranks(stragglers: ModuleType, costs: Any, draws: Draws) -> None:
    alone = stragglers.saved_per_step(costs, 1, 50, draws, same_on_all_ranks=True)
    assert len(set(alone)) > 1
    for num_ranks in (2, 16):
        together = stragglers.saved_per_step(costs, num_ranks, 50, draws, same_on_all_ranks=True)
        assert together.tolist() == alone.tolist()


def test_on_one_rank_every_kind_saves_what_is_expected(stragglers: ModuleType, costs: Any) -> None:
    estimates = stragglers.simulate(costs, [1], plans=4000)
    assert set(estimates) == {"same plan", "balanced", "independent"}
    for (estimate,) in estimates.values():
        assert 0 < estimate.error < 0.002
        assert abs(estimate.saved - costs.expected_saving) < 4 * estimate.error


def test_waiting_costs_independent_draws_nearly_all_and_balanced_ones_little(
    stragglers: ModuleType, costs: Any
) -> None:
    estimates = stragglers.simulate(costs, RANKS, plans=4000)
    independent = [estimate.saved for estimate in estimates["independent"]]
    assert all(more < 0.8 * fewer for fewer, more in pairwise(independent))
    balanced = estimates["balanced"][-1]
    assert independent[-1] < balanced.saved / 3
    assert abs(balanced.saved - costs.expected_saving) < 4 * balanced.error, "all ranks do equal work: nobody waits"
    assert len({estimate.saved for estimate in estimates["same plan"]}) == 1


@pytest.mark.parametrize("draws", ["independent", "balanced"])
def test_a_step_saves_what_its_slowest_rank_saves(stragglers: ModuleType, costs: Any, draws: Draws) -> None:
    saved = stragglers.saved_per_step(costs, 3, 30, draws)
    plan = DropPlan(costs.rates, method="block", draws=draws, same_on_all_ranks=False, groups=costs.groups)
    for step in range(30):
        of_ranks = []
        for rank in range(3):
            plan.draw(step, rank=rank)
            of_ranks.append(costs.macs @ plan.dropped_fractions() / costs.whole)
        assert saved[step] == pytest.approx(min(of_ranks))


def test_without_random_drops_no_rank_waits(stragglers: ModuleType) -> None:
    costs = stragglers.Costs([0.0, 1.0, 1.0], np.array([2.0, 3.0, 5.0]), 20)
    for estimates in stragglers.simulate(costs, [4], plans=4).values():
        (estimate,) = estimates
        assert estimate.saved == pytest.approx(8 / 20) == costs.expected_saving
        assert estimate.error == pytest.approx(0)


@pytest.mark.parametrize(("model", "num_blocks"), [("resnet18", 8), ("vit_b_16", 12)])
def test_blocks_that_are_dropped_together_are_counted_together(
    stragglers: ModuleType, model: str, num_blocks: int
) -> None:
    costs = stragglers.count(model, 0.2)
    assert len(costs.rates) == len(costs.macs) == num_blocks
    with torch.device("meta"):
        network = cf.apply_stochastic_depth(create_model(model), drop_rate=0.2)
    assert costs.expected_saving == pytest.approx(cf.expected_savings(network).expected)


def test_more_ranks_have_fewer_steps_and_the_error_tells(stragglers: ModuleType, costs: Any) -> None:
    estimates = stragglers.simulate(costs, [1, 4], plans=2048)
    assert [estimate.num_steps for estimate in estimates["balanced"]] == [2048, 512]
    assert [estimate.num_steps for estimate in stragglers.simulate(costs, [4], plans=4)["balanced"]] == [256]
    estimate = stragglers.estimate(np.array([0.1, 0.3, 0.1, 0.3]))
    assert estimate == (pytest.approx(0.2), pytest.approx(0.05), 4)


def test_the_command_prints_a_row_per_number_of_ranks_and_draws_them(
    stragglers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "stragglers.png"
    stragglers.main(["--ranks", "1", "2", "4", "--plans", "300", "--picture", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert all(len(row) == 10 for row in rows)
    assert "9.47%" in lines[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("ranks", "plans", "name"), [([0], 10, "ranks"), ([1], 0, "plans")])
def test_bad_numbers_are_refused(stragglers: ModuleType, costs: Any, ranks: list[int], plans: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        stragglers.simulate(costs, ranks, plans)
