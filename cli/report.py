"""The results of a run as a table, ``summary.json`` and a picture, computed from its metrics files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..algorithms import StochasticDepth
from ..algorithms.stochastic_depth import expected_savings
from ..trainer.checkpoint.folder import read_pointer
from .job import Job
from .picture import draw_run
from .start import CHECKPOINTS

TOP1, TOP5 = "metrics/eval/MulticlassAccuracy", "metrics/eval/MulticlassTop5Accuracy"


def report(job: Job) -> None:
    """Print the table of a finished run, and write ``summary.json`` and ``run.png`` beside its metrics."""
    folder = job.folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = {
        **summarise(rows, int(job.trainer.state.timestamp.sample), folder),
        **summarise_depth(job.stochastic_depth, job.network, job.data.image_size),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    depth = job.stochastic_depth
    draw_run(rows, None if depth is None else (depth.plan.rates, depth.realized_drop_rates), folder / "run.png")
    print(as_table(summary))
    where = os.path.relpath(folder)
    files = "summary.json, metrics.jsonl, metrics.csv, settings.json, recipe.yaml, classes.json, weights.pt, run.png"
    print(f"\n{where}/: {files}, checkpoints/")
    print(f"details per class: etude eval {where}")
    if summary["best_checkpoint"] is not None:
        print(f"the same of the best checkpoint: etude eval {where} --checkpoint best")


def summarise(rows: list[dict[str, Any]], num_images: int, folder: Path) -> dict[str, Any]:
    """The results of a run by name; shares are in [0, 1], times in seconds.

    Args:
        rows: Of ``metrics.jsonl``.
        num_images: How many training images were seen.
        folder: Of the run.
    """
    epochs = [row["time/epoch_seconds"] for row in rows if "time/epoch_seconds" in row]
    hours = _last(rows, "time/train")
    evaluated = [row[TOP1] for row in rows if row.get(TOP1) is not None]
    return {
        "test_accuracy": _last(rows, TOP1),
        "test_top5_accuracy": _last(rows, TOP5),
        "test_loss": _last(rows, "loss/eval/total"),
        "best_test_accuracy": max(evaluated, default=None),
        "best_checkpoint": read_pointer(folder / CHECKPOINTS, "best"),
        "epochs": len(epochs),
        "batches": rows[-1]["step"],
        "seconds_per_epoch": sum(epochs) / len(epochs) if epochs else None,
        "images_per_second": num_images / (3600 * hours) if hours else None,
        "share_of_time_waiting_for_data": _last(rows, "step_time/data_share"),
    }


def summarise_depth(depth: StochasticDepth | None, network: nn.Module, image_size: int) -> dict[str, Any]:
    """What stochastic depth was expected to save, and what it saved; nothing for a plain network."""
    if depth is None:
        return {}
    expected, realized = depth.expected_drop_rates, depth.realized_drop_rates
    savings = expected_savings(network, (3, image_size, image_size))
    return {
        "num_stochastic_layers": len(expected),
        "expected_share_of_dropped_blocks": sum(expected) / len(expected),
        "realized_share_of_dropped_blocks": sum(realized) / len(realized),
        "expected_share_of_training_macs_saved": savings.share("macs", expected),
        "realized_share_of_training_macs_saved": savings.share("macs", realized),
    }


def as_table(summary: dict[str, Any]) -> str:
    """The summary as lines of aligned text."""
    epoch, speed, waiting = (
        summary[name] for name in ("seconds_per_epoch", "images_per_second", "share_of_time_waiting_for_data")
    )
    lines = {
        "test accuracy": _percent(summary["test_accuracy"]),
        "test accuracy, top 5": _percent(summary["test_top5_accuracy"]),
        "test loss": "not finite" if summary["test_loss"] is None else f"{summary['test_loss']:.4f}",
        "best checkpoint": f"{summary['best_checkpoint']}, {_percent(summary['best_test_accuracy'])}",
        "training": f"{summary['batches']} batches",
        "time per epoch": f"{epoch:.1f} s" if epoch else "no full epoch",
        "images per second": f"{speed:.1f}" if speed else None,
        "waiting for data": f"{waiting:.1%} of the time" if waiting is not None else None,
    }
    if summary["test_accuracy"] is None:
        for name in ("test accuracy", "test loss"):
            lines[name] = "not evaluated"
    if summary["test_top5_accuracy"] is None:
        lines["test accuracy, top 5"] = None
    if summary["best_checkpoint"] is None:
        lines["best checkpoint"] = None
    if "num_stochastic_layers" in summary:
        lines["stochastic blocks"] = str(summary["num_stochastic_layers"])
        lines["dropped blocks"] = _pair(summary, "share_of_dropped_blocks")
        lines["training MACs saved"] = _pair(summary, "share_of_training_macs_saved")
    shown = {name: value for name, value in lines.items() if value is not None}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def _last(rows: list[dict[str, Any]], name: str) -> Any:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.2f}%"


def _pair(summary: dict[str, Any], name: str) -> str:
    return f"{_percent(summary[f'realized_{name}'])} realized, {_percent(summary[f'expected_{name}'])} expected"
