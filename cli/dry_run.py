"""``--dry-run``: two batches of everything, and an estimate of time and memory."""

import resource
import sys
import tempfile
from pathlib import Path

import torch

from ..engine import State
from .job import Job
from .two_batches import TwoBatches


def dry_run(job: Job) -> None:
    """Train and evaluate two batches, save a checkpoint that is thrown away, and print the estimates."""
    trainer, state = job.trainer, job.trainer.state
    (watch,) = (callback for callback in state.callbacks if isinstance(callback, TwoBatches))
    trainer.fit()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "checkpoint.pt"
        trainer.save_checkpoint(path)
        size = path.stat().st_size if state.rank == 0 else 0
    trainer.close()
    if state.rank != 0:
        return
    batches = len(job.data.train_dataloader)
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    where = "GPU memory" if state.device.type == "cuda" else "memory of the process"
    lines = {
        "data": f"{job.options.data.data}: {batches} batches per epoch, {job.data.num_classes} classes",
        "network": f"{job.options.model.model}, {parameters / 1e6:.1f} million parameters",
        "time per step": f"about {1000 * watch.seconds:.0f} ms",
        "time per epoch": f"about {_duration(batches * watch.seconds)}, and an evaluation",
        "peak memory": f"{_peak_bytes(state) / 2**20:.0f} MiB ({where})",
        "checkpoint": f"{size / 2**20:.0f} MiB",
    }
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))
    print("\nTwo batches were trained, two evaluated, and a checkpoint saved and removed. Nothing is left in runs/.")


def _peak_bytes(state: State) -> int:
    if state.device.type == "cuda":
        return torch.cuda.max_memory_allocated(state.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
