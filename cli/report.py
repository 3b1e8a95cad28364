"""The results of a run as a table, ``summary.json`` and a picture, computed from its metrics files."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..algorithms import StochasticDepth
from ..algorithms.stochastic_depth import expected_savings
from .picture import draw_run


def report(folder: Path, model: nn.Module, stochastic_depth: StochasticDepth, image_size: int) -> None:
    """Print the table of a finished run, and write ``summary.json`` and ``run.png`` beside its metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = summarise(rows, model, stochastic_depth, image_size)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_run(rows, stochastic_depth.plan.rates, stochastic_depth.realized_drop_rates, folder / "run.png")
    print(as_table(summary))
    files = "summary.json, metrics.jsonl, metrics.csv, settings.json, options.json, weights.pt, run.png, checkpoints/"
    print(f"\n{os.path.relpath(folder)}/: {files}")


def summarise(
    rows: list[dict[str, Any]], model: nn.Module, stochastic_depth: StochasticDepth, image_size: int
) -> dict[str, Any]:
    """The results of a run by name; shares and rates are in [0, 1], times in seconds."""
    savings = expected_savings(model, (3, image_size, image_size))
    expected, realized = stochastic_depth.expected_drop_rates, stochastic_depth.realized_drop_rates
    epochs = [row["time/epoch_seconds"] for row in rows if "time/epoch_seconds" in row]
    return {
        "test_accuracy": _last(rows, "metrics/eval/MulticlassAccuracy"),
        "test_loss": _last(rows, "loss/eval/total"),
        "epochs": len(epochs),
        "batches": rows[-1]["step"],
        "seconds_per_epoch": sum(epochs) / len(epochs) if epochs else None,
        "num_stochastic_layers": len(expected),
        "expected_share_of_dropped_blocks": sum(expected) / len(expected),
        "realized_share_of_dropped_blocks": sum(realized) / len(realized),
        "expected_share_of_training_macs_saved": savings.share("macs", expected),
        "realized_share_of_training_macs_saved": savings.share("macs", realized),
    }


def as_table(summary: dict[str, Any]) -> str:
    """The summary as lines of aligned text."""
    lines = {
        "test accuracy": _percent(summary["test_accuracy"]),
        "test loss": "not finite" if summary["test_loss"] is None else f"{summary['test_loss']:.4f}",
        "training": f"{summary['batches']} batches",
        "time per epoch": f"{summary['seconds_per_epoch']:.1f} s" if summary["seconds_per_epoch"] else "no full epoch",
        "stochastic blocks": str(summary["num_stochastic_layers"]),
        "dropped blocks": _pair(summary, "share_of_dropped_blocks"),
        "training MACs saved": _pair(summary, "share_of_training_macs_saved"),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _last(rows: list[dict[str, Any]], name: str) -> Any:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _pair(summary: dict[str, Any], name: str) -> str:
    return f"{_percent(summary[f'realized_{name}'])} realized, {_percent(summary[f'expected_{name}'])} expected"
