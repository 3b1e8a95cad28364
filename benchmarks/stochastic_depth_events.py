"""Time that StochasticDepth takes at the events of a step (rates, plan, sums) as a share of the whole step.

ResNet-50 on synthetic images. The shares are of CPU time in one process, so that other processes matter little.

    python benchmarks/stochastic_depth_events.py
"""

import argparse
import time
from typing import Any

import torch
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from etude import Callback, Trainer
from etude.algorithms import StochasticDepth
from etude.models import composer_resnet

METHODS = ("match", "apply", "state_dict", "rank_state_dict")


class Clock(Callback):
    """Sums the CPU seconds of the methods of an algorithm, and of all steps after the first."""

    def __init__(self, algorithm: StochasticDepth) -> None:
        self.of_algorithm = self.of_steps = 0.0
        self._started = 0.0
        for name in METHODS:
            setattr(algorithm, name, self._timed(getattr(algorithm, name)))

    def _timed(self, method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            started = time.process_time()
            try:
                return method(*arguments)
            finally:
                self.of_algorithm += time.process_time() - started

        return call

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        """Begin after the first step, which looks at every block for the first time."""
        if self._started:
            self.of_steps = time.process_time() - self._started
        else:
            self._started, self.of_algorithm = time.process_time(), 0.0


def main() -> None:
    """Print the share of each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="pixels per side")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_samples = arguments.batch_size * arguments.steps
    data = TensorDataset(torch.randn(num_samples, 3, arguments.size, arguments.size), torch.zeros(num_samples).long())
    for method in ("block", "sample"):
        model = composer_resnet("resnet50", num_classes=10)
        depth = StochasticDepth(drop_rate=0.2, stochastic_method=method)
        clock = Clock(depth)
        trainer = Trainer(
            model,
            DataLoader(data, arguments.batch_size),
            max_duration="1ep",
            algorithms=depth,
            optimizers=SGD(model.parameters(), lr=0.01),
            callbacks=clock,
            device="cpu",
            progress_bar=False,
        )
        trainer.fit()
        steps = arguments.steps - 1
        print(
            f"{method}: {clock.of_algorithm / steps * 1e6:.0f} us of {clock.of_steps / steps * 1e3:.0f} ms per step, "
            f"{clock.of_algorithm / clock.of_steps:.4%}"
        )


if __name__ == "__main__":
    main()
