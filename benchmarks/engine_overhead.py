"""Overhead of the Trainer per step: ``Linear(8, 3)`` at batch 4, compared with a bare loop in the same process.

Both train the same model on the same dataloader with the same optimizer. Pairs of runs alternate, and the median of
the differences is reported, so that other load on the machine affects both alike. PyTorch-Ignite is measured beside
it where it is installed (``pip install pytorch-ignite``).

    python benchmarks/engine_overhead.py
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from etude import Trainer


class Model(nn.Module):
    """A linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The logits of the inputs."""
        return self.linear(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The cross entropy."""
        return F.cross_entropy(outputs, batch[1])


def bare_loop(model: Model, dataloader: DataLoader, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one epoch without the Trainer."""
    started = time.perf_counter()
    for batch in dataloader:
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
    return time.perf_counter() - started


def trainer_loop(model: Model, dataloader: DataLoader, optimizer: torch.optim.Optimizer, run_name: str | None) -> float:
    """Seconds of one epoch in the Trainer, from the start of fit to its end."""
    trainer = Trainer(model, dataloader, max_duration="1ep", optimizers=optimizer, run_name=run_name, device="cpu")
    started = time.perf_counter()
    trainer.fit()
    return time.perf_counter() - started


def ignite_loop(model: Model, dataloader: DataLoader[Any], optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one epoch in PyTorch-Ignite, which runs a step that is written by hand."""
    from ignite.engine import Engine

    def step(engine: Engine, batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        return loss

    engine = Engine(step)
    started = time.perf_counter()
    engine.run(dataloader, max_epochs=1)
    return time.perf_counter() - started


def main() -> None:
    """Print the overhead per step, without and with metrics files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps per run")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(4 * arguments.steps, 8), torch.randint(0, 3, (4 * arguments.steps,)))
    dataloader = DataLoader(data, batch_size=4)
    bare: list[float] = []
    extra: dict[str, list[float]] = {"Trainer": [], "Trainer with metrics files": []}
    if importlib.util.find_spec("ignite") is not None:
        extra["Ignite"] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for pair in range(arguments.pairs):
            model = Model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            bare.append(bare_loop(model, dataloader, optimizer))
            for name, run_name in (("Trainer", None), ("Trainer with metrics files", f"run{pair}")):
                extra[name].append(trainer_loop(model, dataloader, optimizer, run_name) - bare[-1])
            if "Ignite" in extra:
                extra["Ignite"].append(ignite_loop(model, dataloader, optimizer) - bare[-1])
    microseconds = 1e6 / arguments.steps
    print(f"bare loop: {statistics.median(bare) * microseconds:.0f} us per step")
    for name, seconds in extra.items():
        ordered = sorted(second * microseconds for second in seconds)
        middle, low, high = statistics.median(ordered), ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        print(f"{name}: {middle:+.1f} us per step over the bare loop (quartiles {low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
