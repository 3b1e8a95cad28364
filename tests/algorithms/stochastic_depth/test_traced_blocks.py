"""Traced blocks of timm: same outputs, gradients and folding as hand-written ones."""

import pytest

from etude.algorithms.stochastic_depth.blocks.drop_path import find_drop_paths
from helpers.conversion import check_own_masks_taken_over, check_rate_zero, check_training_folding_and_removal
from helpers.traced_blocks import NETWORKS, build

FAST = ("test_byobnet", "cspnext_tiny", "test_coatnet", "gmixer_12_224", "xcit_nano_12_p8_224")


def test_there_are_sixty_classes() -> None:
    assert sum(map(len, NETWORKS.values())) >= 60


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_traced_blocks_compute_train_and_are_restored(name: str) -> None:
    blocks = build(name)
    assert set(NETWORKS[name]) <= set(blocks)
    for cls in NETWORKS[name]:
        network, x = blocks[cls]
        for method in ("block", "sample"):
            check_rate_zero(network, x, method)
            check_training_folding_and_removal(network, x, method, folds=False)
        if find_drop_paths(network):  # the first blocks of a network have the rate 0
            check_own_masks_taken_over(network, x)
