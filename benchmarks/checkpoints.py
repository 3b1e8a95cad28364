"""The cost of checkpoints: the time of a save during ResNet-50 training, and of a resume early and late in an epoch.

python benchmarks/checkpoints.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from etude import Callback, Trainer
from etude.algorithms import StochasticDepth
from etude.models import ComposerClassifier, composer_resnet
from etude.trainer import CheckpointSaver

STEPS_BETWEEN_SAVES = 100


class Images(Dataset):
    """Random images, drawn anew for each access as a random augmentation would be."""

    def __init__(self, num_samples: int, size: int) -> None:
        self.num_samples, self.size = num_samples, size

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, self.size, self.size), index % 10


class Stopwatch(Callback):
    """Measures the time of each step, and notes when the first batch starts."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.first_batch = 0.0
        self._started = 0.0

    def batch_start(self, state: Any, logger: Any) -> None:
        """Note the start of a step."""
        self._started = time.perf_counter()
        self.first_batch = self.first_batch or self._started

    def batch_end(self, state: Any, logger: Any) -> None:
        """Note its duration."""
        self.steps.append(time.perf_counter() - self._started)


def saving(steps: int, saves: int) -> None:
    """Print the time of a step and of a save of a ResNet-50 with AdamW, which keeps two values per parameter."""
    model, stopwatch = composer_resnet("resnet50", num_classes=10), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(folder, "1dur", num_to_keep=2)
        trainer = Trainer(
            model,
            DataLoader(Images(32 * steps, 64), 32),
            max_duration="1ep",
            algorithms=StochasticDepth(drop_rate=0.2),
            optimizers=torch.optim.AdamW(model.parameters(), fused=True),
            callbacks=[stopwatch, saver],
            progress_bar=False,
        )
        trainer.fit()
        seconds = []
        for _ in range(saves):
            started = time.perf_counter()
            saver.save(trainer.state, trainer.logger)
            seconds.append(time.perf_counter() - started)
        size = max(path.stat().st_size for path in Path(folder).glob("*.pt"))
    step, save = statistics.median(stopwatch.steps), statistics.median(seconds)
    share = save / (STEPS_BETWEEN_SAVES * step)
    print(f"step {1e3 * step:.0f} ms, save {1e3 * save:.0f} ms ({size / 1e6:.0f} MB)")
    print(f"a save every {STEPS_BETWEEN_SAVES} steps costs {share:.1%} of the step time")


def resuming(batches: tuple[int, int], rounds: int) -> None:
    """Print the time from the construction of a resumed Trainer to its first batch, for each batch of the epoch."""
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}

    def trainer(**settings: Any) -> tuple[Trainer, Stopwatch]:
        torch.manual_seed(0)
        module, stopwatch = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), Stopwatch()
        data = DataLoader(Images(4 * (max(batches) + 1), 2), 4, shuffle=True)
        model = ComposerClassifier(module, num_classes=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        callbacks = [stopwatch, *settings.pop("callbacks", [])]
        made = Trainer(
            model, data, None, "1ep", optimizers=optimizer, callbacks=callbacks, progress_bar=False, **settings
        )
        return made, stopwatch

    class SaveAt(Callback):
        def batch_checkpoint(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch in batches:
                saver.save(state, logger)

    class Stop(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(folder, "1dur", num_to_keep=-1)
        trainer(callbacks=[SaveAt(), saver])[0].fit()
        for _ in range(rounds):
            for batch in batches:
                started = time.perf_counter()
                resumed, stopwatch = trainer(callbacks=[Stop()], load_path=Path(folder) / f"ep0-ba{batch}.pt")
                try:
                    resumed.fit()
                except KeyboardInterrupt:
                    seconds[batch].append(stopwatch.first_batch - started)
    for batch, times in seconds.items():
        print(f"resume from step {batch}: {1e3 * statistics.median(times):.1f} ms to the first batch")


def main() -> None:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of the ResNet-50")
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=15, help="number of resumes from each step")
    arguments = parser.parse_args()
    saving(arguments.steps, arguments.saves)
    resuming((10, 10_000), arguments.rounds)


if __name__ == "__main__":
    main()
