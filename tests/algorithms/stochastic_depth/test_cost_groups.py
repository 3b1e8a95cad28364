"""Groups of blocks of equal cost, for balanced draws over ranks."""

import numpy as np
import pytest
import torchvision

import etude.functional as cf
from etude.algorithms.stochastic_depth.plan import DropPlan
from etude.models import cifar_resnet

MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "resnet50": lambda: torchvision.models.resnet50(),
    "wide_resnet50_2": lambda: torchvision.models.wide_resnet50_2(),
    "resnext50_32x4d": lambda: torchvision.models.resnext50_32x4d(),
    "cifar_resnet20": lambda: cifar_resnet(20).module,
}


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_of_equal_counted_macs(name: str) -> None:
    model = cf.apply_stochastic_depth(MODELS[name]())
    size = 32 if name.startswith("cifar") else 224
    macs = [block.macs for block in cf.expected_savings(model, (3, size, size)).blocks]
    groups = cf.stochastic_blocks(model)[0].drop_plan.groups.tolist()
    assert len(groups) == len(macs)
    assert len(set(groups)) == len(set(zip(groups, macs, strict=True))), "blocks of a group cost the same"
    assert len(set(groups)) <= len(set(macs)) + 1, "and hardly any are kept apart for nothing"


def test_branches_of_a_transformer_are_separate_groups() -> None:
    model = cf.apply_stochastic_depth(torchvision.models.vit_b_16(), drop_unit="branch")
    assert cf.stochastic_blocks(model)[0].drop_plan.groups.tolist() == [0, 1] * 12


GROUPS = [0, 1, 1, 2, 1, 1, 1, 2, 1, 1]


def balanced(num_steps: int, ranks: range) -> np.ndarray:
    """What is dropped: booleans of shape ``(steps, ranks, blocks)``."""
    rates = [0.05 * block for block in range(1, 11)]
    plan = DropPlan(rates, method="block", draws="balanced", same_on_all_ranks=False, groups=GROUPS)
    dropped = []
    for step in range(num_steps):
        for rank in ranks:
            plan.draw(step, rank=rank)
            dropped.append(plan.dropped_blocks)
    return np.array(dropped).reshape(num_steps, len(ranks), 10)


def test_every_rank_drops_as_many_of_each_group_but_not_the_same() -> None:
    dropped = balanced(300, range(4))
    for group in set(GROUPS):
        counts = dropped[:, :, np.array(GROUPS) == group].sum(axis=2)
        assert counts.max() > 0
        assert (counts == counts[:, :1]).all()
    assert (dropped != dropped[:, :1]).any(axis=(1, 2)).mean() > 0.5


def test_rates_stay_exact_with_groups() -> None:
    num_steps = 20_000
    share = balanced(num_steps, range(1, 2)).mean(axis=(0, 1))
    rates = np.array([0.05 * block for block in range(1, 11)])
    assert (np.abs(share - rates) < 4.5 * np.sqrt(rates * (1 - rates) / num_steps)).all(), share


def test_the_number_of_dropped_blocks_stays_within_one_of_its_mean() -> None:
    counts = balanced(2000, range(1)).sum(axis=(1, 2))
    assert set(counts) == {2, 3}  # the rates add up to 2.75
