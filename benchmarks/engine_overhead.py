"""Overhead of the Trainer per step: ``Linear(8, 3)`` at batch 4, compared with a bare loop in the same process.

All train the same model on the same dataloader with the same optimizer, without a progress bar. The runs alternate, and
the median of the differences to the bare loop of the same round is reported, so that other load on the machine affects
all alike. PyTorch-Ignite and PyTorch Lightning are measured where they are installed (``pip install pytorch-ignite
pytorch-lightning``), without their loggers, checkpoints and progress bars.

    python benchmarks/engine_overhead.py
"""

import argparse
import importlib.util
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from etude import Trainer

Loop = Callable[["Model", DataLoader[Any], Optimizer], float]


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


def bare_loop(model: Model, dataloader: DataLoader[Any], optimizer: Optimizer) -> float:
    """CPU seconds of one epoch without the Trainer."""
    started = time.process_time()
    for batch in dataloader:
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
    return time.process_time() - started


def trainer_loop(model: Model, dataloader: DataLoader[Any], optimizer: Optimizer, **settings: Any) -> float:
    """CPU seconds of one epoch in the Trainer, from the start of fit to its end."""
    settings = {"device": "cpu", "progress_bar": False, **settings}
    trainer = Trainer(model, dataloader, max_duration="1ep", optimizers=optimizer, **settings)
    started = time.process_time()
    trainer.fit()
    return time.process_time() - started


def ignite_loop(model: Model, dataloader: DataLoader[Any], optimizer: Optimizer) -> float:
    """CPU seconds of one epoch in PyTorch-Ignite, which runs a step that is written by hand."""
    from ignite.engine import Engine

    def step(engine: Engine, batch: Any) -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        return loss

    engine = Engine(step)
    started = time.process_time()
    engine.run(dataloader, max_epochs=1)
    return time.process_time() - started


def lightning_loop(model: Model, dataloader: DataLoader[Any], optimizer: Optimizer) -> float:
    """CPU seconds of one epoch in PyTorch Lightning."""
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model.loss(self.model(batch), batch)

        def configure_optimizers(self) -> Optimizer:
            return optimizer

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **off)
    module = Module()
    started = time.process_time()
    trainer.fit(module, dataloader)
    return time.process_time() - started


def loops() -> dict[str, Loop]:
    """What is compared with the bare loop, by name."""
    numbers = iter(range(10**6))

    def with_files(*arguments: Any) -> float:
        return trainer_loop(*arguments, run_name=f"run{next(numbers)}")

    found: dict[str, Loop] = {
        "Trainer": trainer_loop,
        "Trainer with its progress bar": lambda *arguments: trainer_loop(*arguments, progress_bar=True),
        "Trainer with metrics files": with_files,
    }
    if importlib.util.find_spec("ignite") is not None:
        found[f"Ignite {version('pytorch-ignite')}"] = ignite_loop
    if importlib.util.find_spec("pytorch_lightning") is not None:
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        found[f"Lightning {version('pytorch-lightning')}"] = lightning_loop
    return found


def main() -> None:
    """Print the overhead per step of each loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps per run")
    parser.add_argument("--pairs", type=int, default=15, help="rounds of runs")
    parser.add_argument("--fused", action="store_true", help="SGD with fused=True, which a flag on the device can skip")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of the loops to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(4 * arguments.steps, 8), torch.randint(0, 3, (4 * arguments.steps,)))
    dataloader = DataLoader(data, batch_size=4)
    measured = {name: loop for name, loop in loops().items() if name.startswith(tuple(arguments.only))}
    bare: list[float] = []
    extra: dict[str, list[float]] = {name: [] for name in measured}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(arguments.pairs):
            model = Model()
            optimizer = SGD(model.parameters(), lr=0.01, fused=arguments.fused)
            bare.append(bare_loop(model, dataloader, optimizer))
            for name, loop in measured.items():
                extra[name].append(loop(model, dataloader, optimizer) - bare[-1])
    microseconds = 1e6 / arguments.steps
    print(f"torch {torch.__version__}, bare loop: {statistics.median(bare) * microseconds:.0f} us per step")
    for name, seconds in extra.items():
        ordered = sorted(second * microseconds for second in seconds)
        middle, low, high = statistics.median(ordered), ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
        print(f"{name}: {middle:+.1f} us per step over the bare loop (quartiles {low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
