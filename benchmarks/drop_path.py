"""What skipping costs and saves where drop paths are used: ViT, ConvNeXt, Swin, EfficientNet and ResNet.

    python benchmarks/drop_path.py            # all networks: about 7 minutes on two cores
    python benchmarks/drop_path.py --write    # the same, and puts the table into docs/benchmarks.md
    python benchmarks/drop_path.py --quick    # two rounds of two images each, to see that it works

Each network is trained in turns, step by step in one process: plain, with its library's own drop path, and with the
block and the sample method of stochastic depth (balanced draws), at uniform rates. Step times are medians of the ratios
to the plain step of the same round. The share of compute is that of the multiply-accumulates which the drawn plans
dropped; medians, too. Peak memory is what a step allocates at most beyond what it found, as a ratio to the plain step.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler that measures the memory; before torch is imported

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import etude.functional as cf
from etude.algorithms.stochastic_depth.blocks.drop_path import find_drop_paths, is_drop_path
from interleaved import time_in_turns

BEGIN, END = "<!-- drop_path: begin -->", "<!-- drop_path: end -->"


@dataclass(frozen=True)
class Network:
    """A network and the data it is trained on.

    Args:
        make: Builds it, with drop paths of its own.
        size: Height and width of the images.
        rates: Uniform drop rates to measure.
        batch_size: Images in a batch.
    """

    make: Callable[[], nn.Module]
    size: int
    rates: tuple[float, ...] = (0.1, 0.4)
    batch_size: int = 16


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, drop_path_rate=0.1, **options)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, num_classes=10)


SMALL_VIT: dict[str, Any] = {"img_size": 96, "patch_size": 8, "depth": 8, "embed_dim": 256, "num_heads": 4}
NETWORKS: dict[str, Network] = {
    "timm ViT-S/16": Network(_timm("vit_small_patch16_224", img_size=128), 128),
    "timm ViT, 8 layers of 256": Network(_timm("vit_tiny_patch16_224", **SMALL_VIT), 96, rates=(0.4,)),
    "torchvision ConvNeXt-Tiny": Network(_torchvision("convnext_tiny"), 96),
    "torchvision Swin-T": Network(_torchvision("swin_t"), 112),
    "torchvision EfficientNet-B0": Network(_torchvision("efficientnet_b0"), 128),
    "timm ResNet-50": Network(_timm("resnet50"), 96),
}


class Training:
    """One variant of a network: its training step, and the shares of compute that its steps dropped."""

    def __init__(self, network: Network, method: str, rate: float, batch: tuple[Tensor, Tensor]) -> None:
        torch.manual_seed(0)
        self.model = network.make().train()
        _set_uniform_rates(self.model, rate if method == "own" else 0.0)
        self.batch = batch
        self.expected = 0.0
        self.shares: list[float] = []
        if method in ("block", "sample"):
            _convert(self.model, method, rate)
            self.savings = cf.expected_savings(self.model, (3, network.size, network.size))
            self.expected = self.savings.expected
        self.is_converted = method in ("block", "sample")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self) -> None:
        """Forward, backward and update."""
        self.optimizer.zero_grad()
        images, targets = self.batch
        F.cross_entropy(self.model(images), targets).backward()
        self.optimizer.step()
        if self.is_converted:
            blocks = cf.stochastic_blocks(self.model)
            dropped = blocks[0].drop_plan.dropped_fractions()
            by_branch = [dropped[index] for block in blocks for index in block.drop_indices]
            self.shares.append(self.savings.share("macs", by_branch))


def _convert(model: nn.Module, method: Any, rate: float) -> None:
    cf.apply_stochastic_depth(
        model, stochastic_method=method, drop_rate=rate, drop_distribution="uniform", draws="balanced"
    )


def _set_uniform_rates(model: nn.Module, rate: float) -> None:
    for name in find_drop_paths(model):
        module: Any = model.get_submodule(name)
        assert is_drop_path(module)
        setattr(module, "p" if hasattr(module, "p") else "drop_prob", rate)


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes that a step holds at a time beyond those that were there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((one for one in events if one.get("name") == "[memory]"), key=lambda one: one["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def measure(name: str, network: Network, rounds: int, memory_steps: int) -> Iterator[str]:
    """The rows of the table for one network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = network.batch_size, 3, network.size, network.size
    batch = torch.randn(shape, device=device), torch.randint(0, 10, shape[:1], device=device)
    methods: tuple[Literal["own", "block", "sample"], ...] = ("own", "block", "sample")
    variants = {("plain", 0.0), *((method, rate) for rate in network.rates for method in methods)}
    trainings = {variant: Training(network, *variant, batch) for variant in sorted(variants)}
    for training in trainings.values():
        training.model.to(device)
    named = {f"{method} {rate}": training for (method, rate), training in trainings.items()}
    seconds = time_in_turns({key: _synchronized(training.step) for key, training in named.items()}, rounds, warmup=3)
    plain_seconds, plain_bytes = seconds["plain 0.0"], _median_peak(trainings["plain", 0.0], memory_steps)
    yield f"| {name}, {network.size} px | plain | | 1 ({1e3 * statistics.median(plain_seconds):.0f} ms) | | | | 1 |"
    for rate in network.rates:
        for method in methods:
            training = trainings[method, rate]
            pairs = zip(seconds[f"{method} {rate}"], plain_seconds, strict=True)
            ratio = statistics.median(one / plain for one, plain in pairs)
            shares = ["", "", ""]
            if training.is_converted:
                dropped = statistics.median(training.shares[3:])
                shares = [
                    f"{training.expected:.3f}",
                    f"{dropped:.3f}",
                    f"{(1 - ratio) / dropped:.0%}" if dropped else "",
                ]
            memory = _median_peak(training, memory_steps) / plain_bytes
            yield f"| | {method} | {rate} | {ratio:.3f} | {' | '.join(shares)} | {memory:.2f} |"


def _median_peak(training: Training, steps: int) -> float:
    return statistics.median(peak_bytes(training.step) for _ in range(steps))


def _synchronized(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Measure, and print the table or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only networks whose name contains this")
    parser.add_argument("--rounds", type=int, default=12, help="how often each variant is timed")
    parser.add_argument("--quick", action="store_true", help="two rounds of two images")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    lines = [
        "| network | drop path | rate | step time | expected share | dropped share | saved / dropped | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}", *lines, sep="\n", flush=True)
    for name, network in NETWORKS.items():
        if arguments.match not in name:
            continue
        if arguments.quick:
            network = Network(network.make, network.size, network.rates, batch_size=2)
        for line in measure(name, network, 2 if arguments.quick else arguments.rounds, 1 if arguments.quick else 3):
            print(line, flush=True)
            lines.append(line)
    if arguments.write:
        page = Path(__file__).parent.parent / "docs" / "benchmarks.md"
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after)


if __name__ == "__main__":
    main()
