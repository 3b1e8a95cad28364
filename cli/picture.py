"""Plots of a run (loss, accuracy, how often each block was dropped) and of the costs of a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..algorithms.stochastic_depth import Savings


def draw_run(rows: list[dict[str, Any]], drops: tuple[Sequence[float], Sequence[float]] | None, path: Path) -> None:
    """Plot a run and save it as PNG.

    Args:
        rows: The rows of ``metrics.jsonl``.
        drops: For each block its drop rate at the end of the run, and the fraction of the steps (or rows) in which it
            was dropped; None for a plain network.
        path: The file to write.
    """
    num_plots = 2 if drops is None else 3
    figure = Figure(figsize=(1 + 4 * num_plots, 4), layout="constrained")
    plots = figure.subplots(1, num_plots)
    _draw_loss(plots[0], rows)
    _draw_accuracy(plots[1], rows)
    if drops is not None:
        _draw_drops(plots[2], *drops)
    figure.savefig(path, dpi=120)


def draw_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix and save it as PNG.

    Args:
        confusion: For each true class how many of its images were predicted as each class.
        class_names: Of each class.
        path: The file to write.
    """
    count = len(class_names)
    side = min(16.0, 3 + 0.35 * count)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = [[number / max(1, sum(row)) for number in row] for row in confusion]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    if count <= 40:
        axes.set_xticks(range(count), class_names, rotation=90)
        axes.set_yticks(range(count), class_names)
    if count <= 20:
        for row, numbers in enumerate(confusion):
            for column, number in enumerate(numbers):
                colour = "white" if shares[row][column] > 0.5 else "black"
                if number:
                    axes.text(column, row, str(number), ha="center", va="center", color=colour, fontsize=8)
    axes.set(title="Confusion matrix", xlabel="predicted class", ylabel="true class")
    figure.savefig(path, dpi=120)


def draw_plan(savings: Savings, title: str, path: Path) -> None:
    """Plot the cost of each block and its expected saving, and save the plot as PNG.

    Args:
        savings: The costs.
        title: The title of the plot.
        path: The file to write.
    """
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    blocks = range(1, len(savings.blocks) + 1)
    shares = [100 * block.macs / savings.macs for block in savings.blocks]
    saved = [share * block.drop_rate for share, block in zip(shares, savings.blocks, strict=True)]
    axes.bar(blocks, shares, color="lightgray", label=f"can be dropped: {savings.maximal:.1%} of the network")
    axes.bar(blocks, saved, color="tab:blue", label=f"expected to be saved: {savings.expected:.1%}")
    axes.set(title=title, xlabel="block", ylabel="% of the MACs of the network")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.25)  # room for the legend
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def _draw_loss(axes: Axes, rows: list[dict[str, Any]]) -> None:
    steps, losses = _series(rows, "loss/train/total")
    axes.plot(steps, losses, color="tab:blue", linewidth=0.8, label="training, each batch")
    steps, losses = _series(rows, "loss/eval/total")
    axes.plot(steps, losses, color="tab:orange", marker="o", label="test")
    axes.set(title="Loss", xlabel="batch", ylabel="cross entropy", yscale="log")
    axes.legend()


def _draw_accuracy(axes: Axes, rows: list[dict[str, Any]]) -> None:
    steps, accuracies = _series(rows, "metrics/eval/MulticlassAccuracy")
    percent = [100 * accuracy for accuracy in accuracies]
    axes.plot(steps, percent, color="tab:orange", marker="o")
    if len(steps) <= 12:
        for step, value in zip(steps, percent, strict=True):
            axes.annotate(f"{value:.1f}", (step, value), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.margins(0.12)
    axes.set(title="Test accuracy", xlabel="batch", ylabel="%")


def _draw_drops(axes: Axes, rates: Sequence[float], realized: Sequence[float]) -> None:
    blocks = range(1, len(rates) + 1)
    axes.bar(blocks, [100 * share for share in realized], color="tab:blue", alpha=0.6, label="dropped")
    axes.plot(blocks, [100 * rate for rate in rates], color="black", marker=".", label="drop rate at the end")
    axes.set(title="Stochastic depth", xlabel="block", ylabel="% of the steps or rows")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left")


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
