"""The share of training MACs that the block method saves when many ranks wait for the slowest, by simulation.

python benchmarks/stragglers.py
python benchmarks/stragglers.py --picture docs/stragglers.png
python benchmarks/stragglers.py --model resnet152 --drop-rate 0.5
python benchmarks/stragglers.py --ranks 8 --plans 700000
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

import etude.functional as cf
from etude.algorithms.stochastic_depth.draws import Draws
from etude.algorithms.stochastic_depth.plan import DropPlan
from etude.models import create_model

RANKS = tuple(2**power for power in range(11))
FEWEST_STEPS = 256
KINDS = ("same plan", "balanced", "independent")


class Costs(NamedTuple):
    """The costs of the blocks of a network.

    Args:
        rates: The rate of each block, in [0, 1].
        macs: The MACs that dropping it saves.
        whole: The MACs of the whole network.
        groups: For each block the number of its group of equal cost, for balanced draws; None for one group.
    """

    rates: list[float]
    macs: np.ndarray
    whole: int
    groups: Sequence[int] | None = None

    @property
    def expected_saving(self) -> float:
        """The share of the training MACs that the rates save on a single rank."""
        return float(self.macs @ self.rates) / self.whole


class Estimate(NamedTuple):
    """The share of the training MACs that is saved, in [0, 1], as the mean over steps and its standard error."""

    saved: float
    error: float
    num_steps: int


def count(model: str, drop_rate: float, image_size: int = 224) -> Costs:
    """The costs of a network with linear rates, counted on square images of `image_size` pixels."""
    with torch.device("meta"):
        network = cf.apply_stochastic_depth(create_model(model), drop_rate=drop_rate)
    savings = cf.expected_savings(network, (3, image_size, image_size))
    blocks = cf.stochastic_blocks(network)
    indices = [index for block in blocks for index in block.drop_indices]  # all branches of a block have its index
    macs = np.bincount(indices, weights=[branch.macs for branch in savings.blocks])
    plan = blocks[0].drop_plan
    return Costs(plan.rates, macs, savings.macs, plan.groups.tolist())


def simulate(costs: Costs, ranks: Sequence[int] = RANKS, plans: int = 65536) -> dict[str, list[Estimate]]:
    """Estimate the savings for each number of ranks, by kind of plan.

    Args:
        costs: The costs.
        ranks: Numbers of ranks.
        plans: Number of plans to draw for each kind and number of ranks, in at least 256 steps.

    Raises:
        ValueError: If a number of ranks or of plans is not positive.
    """
    if min(ranks) < 1:
        raise ValueError(f"ranks must be positive, got {min(ranks)}")
    if plans < 1:
        raise ValueError(f"plans must be positive, got {plans}")
    # One rank is enough where all drop the same blocks; balanced draws save the same on average, with less variance.
    same = estimate(saved_per_step(costs, 1, plans, "balanced", same_on_all_ranks=True))
    estimates = {"same plan": [same] * len(ranks)}
    different: tuple[Draws, ...] = ("balanced", "independent")
    for draws in different:
        estimates[draws] = [
            estimate(saved_per_step(costs, number, max(FEWEST_STEPS, plans // number), draws)) for number in ranks
        ]
    return estimates


def saved_per_step(
    costs: Costs, num_ranks: int, num_steps: int, draws: Draws = "independent", same_on_all_ranks: bool = False
) -> np.ndarray:
    """The share of the MACs that the slowest rank saves in each step: an array of shape ``(steps,)``.

    Args:
        costs: The costs.
        num_ranks: Number of ranks that wait for each other.
        num_steps: Number of steps to draw, at 10 to 40 us per step and rank.
        draws: Kind of the draws.
        same_on_all_ranks: Whether every rank drops the same blocks.
    """
    plan = DropPlan(costs.rates, method="block", draws=draws, same_on_all_ranks=same_on_all_ranks, groups=costs.groups)
    least = [(_dropped(plan, step, num_ranks) @ costs.macs).min() for step in range(num_steps)]
    return np.array(least) / costs.whole


def estimate(saved: np.ndarray) -> Estimate:
    """Mean and standard error of the savings of each step, an array of shape ``(steps,)``."""
    return Estimate(float(saved.mean()), float(saved.std() / len(saved) ** 0.5), len(saved))


def as_table(estimates: Mapping[str, Sequence[Estimate]], ranks: Sequence[int]) -> str:
    """The savings as aligned text."""
    lines = [
        f"{'':>5}" + "".join(f"  {kind:>25}" for kind in KINDS),
        f"{'ranks':>5}" + f"  {'saved':>8} {'error':>8} {'steps':>7}" * len(KINDS),
    ]
    for place, num_ranks in enumerate(ranks):
        cells = [estimates[kind][place] for kind in KINDS]
        line = "".join(f"  {cell.saved:>8.2%} {cell.error:>8.3%} {cell.num_steps:>7}" for cell in cells)
        lines.append(f"{num_ranks:>5}{line}")
    return "\n".join(lines)


def draw(estimates: Mapping[str, Sequence[Estimate]], ranks: Sequence[int], title: str, path: Path) -> None:
    """Plot the savings over the number of ranks, and save the plot as PNG."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind, color, style in zip(KINDS, ("black", "tab:blue", "tab:orange"), ("-", "--", "-"), strict=True):
        percent = np.array([100 * value.saved for value in estimates[kind]])
        margin = np.array([200 * value.error for value in estimates[kind]])
        axes.plot(ranks, percent, style, color=color, marker="o", markersize=4, clip_on=False)
        axes.fill_between(ranks, percent - margin, percent + margin, color=color, alpha=0.2, linewidth=0)
        label = f"{kind}  {percent[-1]:.1f}%"
        place = (ranks[-1], percent[-1])
        above = {"same plan": 7, "balanced": -7}.get(kind, 0)  # these two may overlap
        axes.annotate(label, place, textcoords="offset points", xytext=(10, above), va="center", color=color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(number) for number in ranks])
    axes.set_xlim(ranks[0], ranks[-1])
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=title, xlabel="ranks that wait for each other", ylabel="% of the training MACs saved")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print the table and, if requested, save the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a model name as in etude plan")
    parser.add_argument("--drop-rate", type=float, default=0.2, help="drop rate of the last block; linear over depth")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, metavar="N")
    parser.add_argument("--plans", type=int, default=65536, help="number of plans for each kind and number of ranks")
    parser.add_argument("--picture", type=Path, help="a PNG file to save a plot of the table to")
    chosen = parser.parse_args(arguments)
    costs = count(chosen.model, chosen.drop_rate, chosen.image_size)
    what = f"{chosen.model}, drop rate {chosen.drop_rate:g} linear, {chosen.image_size}x{chosen.image_size}"
    print(f"{what}: the rates save {costs.expected_saving:.2%} of the training MACs on a single rank\n")
    estimates = simulate(costs, chosen.ranks, chosen.plans)
    print(as_table(estimates, chosen.ranks))
    if chosen.picture is not None:
        draw(estimates, chosen.ranks, what, chosen.picture)
        print(f"\n{chosen.picture}")


def _dropped(plan: DropPlan, step: int, num_ranks: int) -> np.ndarray:
    """The blocks that each rank drops in a step: booleans of shape ``(ranks, blocks)``."""
    rows = []
    for rank in range(num_ranks):
        plan.draw(step, rank=rank)
        rows.append(plan.dropped_blocks)
    return np.array(rows)


if __name__ == "__main__":
    main()
